"""`python -m lesion` is the command `lesion`."""

from lesion.cli.study import main

if __name__ == "__main__":
    main()
