"""`python -m trainer`: the `ddrl` command, for `ray job submit`."""

from trainer.cli.main import main

if __name__ == "__main__":
    main()
