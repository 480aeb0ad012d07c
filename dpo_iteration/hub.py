"""`push_to_hub` as in TRL (hub_model_id, hub_private_repo, hub_strategy, hub_revision), with the model that
is whole.

The Trainer's own last push comes too early for us: before the adapters are merged, and without our card. Its
pushes of checkpoints on the way (`hub_strategy: every_save`) are left as they are.
"""

import os
from typing import TYPE_CHECKING

from common.cli import UserError, one_line
from common.hub import make_repository
from dpo_iteration.arguments import Arguments

if TYPE_CHECKING:
    from trl import DPOConfig, DPOTrainer

# Top-level files of pushes on the way that would be taken for the model, or that hold settings of this
# machine.
STALE = ["adapter_config.json", "adapter_model.*", "model*.safetensors*", "training_args.bin"]


def take_token(args: Arguments):
    """Move `hub_token` into the environment, where the hub's client looks; no file is to hold it."""
    if args.hub_token:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def reach(config: "DPOConfig"):
    """Make the repository, or find it, before a model is loaded: a wrong token is to be known now, not hours
    later.
    """
    if not config.push_to_hub:
        return
    name = config.hub_model_id or os.path.basename(os.path.abspath(config.output_dir))
    make_repository(name, config.hub_private_repo, "--push_to_hub")


def push(trainer: "DPOTrainer", folder: str):
    """Upload the folder in place of what pushes on the way have left. On rank 0, with the model complete on
    disk.

    Raises:
        UserError: it did not work; nothing on disk is lost, and the line has the command to do it later.
    """
    from huggingface_hub import upload_folder

    name = trainer.hub_model_id
    try:
        trainer._finish_current_push()
        done = upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="End of training",
            revision=trainer.args.hub_revision,
            ignore_patterns=["_*", "checkpoint-*", ".*"],
            delete_patterns=STALE,
        )
    except Exception as error:
        raise UserError(
            f"{folder} is complete but was not pushed: {one_line(error)}; later: hf upload {name} {folder}"
        ) from None
    print(f"pushed to {done.commit_url}", flush=True)
