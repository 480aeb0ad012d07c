"""run_dpo.py, which says after the reference's pass how much of the reference is still in memory: started in
its place by a test.
"""

import gc
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run
from dpo_iteration import run_dpo


def main():
    from dpo_iteration import models, reference

    held, load, compute = [], models.load_model, reference.compute_reference

    def size(parameter):
        return (
            0
            if parameter is None
            else parameter.untyped_storage().nbytes() + parameter.ds_tensor.untyped_storage().nbytes()
        )

    def loaded(*given):
        model = load(*given)
        held.extend(map(weakref.ref, model.parameters()))
        print(f"the reference has {sum(size(one()) for one in held)} bytes", flush=True)
        return model

    def computed(*given):
        compute(*given)
        models.load_model = load  # what comes now is the policy
        gc.collect()
        print(f"of the reference {sum(size(one()) for one in held)} bytes are kept", flush=True)

    models.load_model, reference.compute_reference = loaded, computed
    run_dpo.main()


if __name__ == "__main__":
    run(main)
