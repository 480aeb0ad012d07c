def all_gather(*args):
    raise NotImplementedError("STAND-IN: ring attention is not used here")
