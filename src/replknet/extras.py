"""How to get what an installation lacks, in the words of every error that says so; it imports nothing."""


def installing(extra: str = "") -> str:
    """The command that installs the package with an extra, run in a clone of the repository.

    Args:
        extra: a name of `[project.optional-dependencies]` in pyproject.toml, or several with commas; "" for none.

    Returns:
        The command, and where to run it. Once an index has the name replknet, this is the one line to change.
    """
    what = f'".[{extra}]"' if extra else "."
    return f"`pip install {what}` in a clone of replknet"
