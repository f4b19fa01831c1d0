"""Settings of the federated strategy that cannot work, told before any process starts."""

from __future__ import annotations

from fomoe_pl.errors import ConfigError

KEY = "trainer.strategy.init_args"


def check_settings(
    *, sites: int | None, ranks_per_site: int, reshuffle_rounds: int, bucket_mib: int, share_device: bool
) -> None:
    """Check what can be checked without a model or a trainer.

    Raises:
        ConfigError: naming the setting, the rule and what would be valid.
    """
    if ranks_per_site != 1:
        rule = "several ranks in a site are not supported yet"
        raise ConfigError(f"{KEY}.ranks_per_site", ranks_per_site, rule, "set it to 1 and let every rank be a site")
    for name, value in (("reshuffle_rounds", reshuffle_rounds), ("bucket_mib", bucket_mib)):
        if value < 1:
            raise ConfigError(f"{KEY}.{name}", value, "must be at least 1", "type 1 or more")
    if share_device and sites is None:
        raise ConfigError(f"{KEY}.sites", sites, "must be given when sites share a device", "for example 4")


def check_processes(sites: int | None, n_processes: int) -> int:
    """Number of sites, if it fits the number of processes.

    Raises:
        ConfigError: if it does not.
    """
    if sites is None or sites == n_processes:
        return n_processes
    rule = f"must equal the number of processes ({n_processes} = trainer.devices x num_nodes)"
    raise ConfigError(f"{KEY}.sites", sites, rule, f"set trainer.devices to {sites}, or sites to {n_processes}")


def check_same_sites(path: str, written_by: int, n_sites: int) -> None:
    """Refuse to resume on another number of sites.

    Raises:
        ConfigError: if the numbers differ.
    """
    if written_by != n_sites:
        rule = f"was written by {written_by} sites, this run has {n_sites}"
        raise ConfigError("ckpt_path", path, rule, f"resume on {written_by} sites")
