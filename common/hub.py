"""A repository on the hub, made or found before the work that is to go there."""

from common.cli import UserError, one_line


def make_repository(name: str, private: bool | None, flag: str, kind: str = "model"):
    """Make a repository, or find it: a wrong token is to be known now, not hours later.

    Args:
        name: `OWNER/NAME`, or `NAME` of one's own. private: None as the owner's settings have it.
        flag: of the command line that asks for it. kind: model or dataset.

    Raises:
        UserError: it cannot be made or reached.
    """
    from huggingface_hub import create_repo, whoami

    try:
        whoami()  # what create_repo says of a wrong token is of no help
        create_repo(name, private=private, exist_ok=True, repo_type=kind)
    except Exception as error:
        raise UserError(
            f"{flag}: cannot make or reach the repository {name}; log in with `hf auth login`: "
            f"{one_line(error)}"
        ) from None
