"""`python -m scoresde` is `scoresde-doctor`."""

from .cli.doctor import main

if __name__ == "__main__":
    main()
