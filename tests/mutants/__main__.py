"""The command."""

import sys

if __name__ == "__main__":  # each process for a fault imports this, too
    from tests.mutants.run import main

    sys.exit(main())
