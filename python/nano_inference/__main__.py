"""`python -m nano_inference` is the command `nano-inference`."""

from .cli import main

if __name__ == "__main__":
    main()
