"""Which TRL: checked before anything of it is imported."""

try:
    import trl
except ImportError as error:
    raise ImportError(
        "trl: expected TRL 1.16 beside this package, found none. Install 'trl==1.16.*', or use "
        "dpop_trainer.DPOPTrainer, which does not need it."
    ) from error

KNOWN_VERSIONS = ("1.16",)


def check_trl_version(version: str) -> None:
    """
    Args:
        version: of the installed TRL.

    Raises:
        ImportError: it is none whose internals this folder was tested with.
    """
    if ".".join(version.split(".")[:2]) not in KNOWN_VERSIONS:
        raise ImportError(
            f"trl: expected version {' or '.join(KNOWN_VERSIONS)}, got {version}, whose losses may be computed in "
            "another way. Install 'trl==1.16.*', or use dpop_trainer.DPOPTrainer, which does not need it."
        )


check_trl_version(trl.__version__)
