"""``python -m fedsparse``: the command line."""

from fedsparse.cli import main

if __name__ == "__main__":
    main()
