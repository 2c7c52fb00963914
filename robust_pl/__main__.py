"""``python -m robust_pl`` is the same as ``robust-pl``."""

from .cli import main

if __name__ == "__main__":
    main()
