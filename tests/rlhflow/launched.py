"""run_dpo.py, which says after the reference's pass whether anything still holds the reference: started in its place by a test."""

import gc
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run
from dpo_iteration import run_dpo


def main():
    from dpo_iteration import models, reference

    held, load, compute = [], models.load_model, reference.compute_reference

    def loaded(*given):
        model = load(*given)
        held.extend(weakref.ref(one) for one in (model, *model.parameters()))
        return model

    def computed(*given):
        compute(*given)
        gc.collect()
        print(f"of the reference {sum(one() is not None for one in held)} of {len(held)} parts are kept", flush=True)

    models.load_model, reference.compute_reference = loaded, computed
    run_dpo.main()


if __name__ == "__main__":
    run(main)
