"""`python -m bench [NAME …]` or `python -m bench gpu …`, which runs on a bare machine as well."""

from __future__ import annotations

import sys


def main() -> int:
    """Run what was asked for; only what it needs is imported."""
    if sys.argv[1:2] == ["gpu"]:
        from bench.gpu import run

        return run.main(sys.argv[2:])
    from bench import suite

    suite.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
