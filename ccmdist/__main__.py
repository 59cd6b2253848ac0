"""``python -m ccmdist`` is the command ``ccmdist``."""

from ccmdist.cli import main

if __name__ == "__main__":
    main()
