"""What lies in the folder of a set."""

import hashlib

from ccmdist.data.reader import read_split


def contents(folder):
    """SHA-256 of every file of a set."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def images_of(folder):
    """The images of the test split by key."""
    return {triple.key: triple.image for triple in read_split(folder, "test")}
