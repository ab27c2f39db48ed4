"""What a Bazel ``py_test`` runs: pytest on the file it is given."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-q", "-m", "not slow", *sys.argv[1:]]))
