"""`fomoe completion SHELL`: what a shell needs to complete commands, options and names of configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# Completion of fomoe for {shell}. Made by `fomoe completion {shell}`; make it again after an update.
{start}_fomoe() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" options=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case "$before" in
    -c|--config|--like)
      COMPREPLY=($(compgen -W "{names}" -- "$word") $(compgen -f -- "$word"))
      return ;;
  esac
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _fomoe fomoe
"""


def script(shell: str, options: Mapping[str, Iterable[str]], names: Iterable[str]) -> str:
    """The script that a shell reads.

    Args:
        shell: One of `SHELLS`.
        options: Command -> its options, dashes included.
        names: Of configurations.
    """
    cases = "\n".join(f'    {name}) options="{" ".join(sorted(words))}" ;;' for name, words in options.items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _SCRIPT.format(
        shell=shell, start=start, commands=" ".join(options), names=" ".join(names), cases=cases,
    )  # fmt: skip
