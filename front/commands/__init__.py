"""One file for each command: ``add`` adds its parser, ``run`` does what was asked and returns (text, exit code)."""
