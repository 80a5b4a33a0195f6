"""Messages of errors in the manifest of a stored artifact, and in ``RECPRESS_HOME``.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.

An artifact is a set of files. Its manifest lists each file's path and size, and one SHA-256 hash
for each chunk of the file. From manifest version 2 on, each file is stored as one blob, whose name
is a hash of the file's chunk hashes; the manifest also lists these names. Code that reads a stored
manifest adds what to do: delete the artifact and run the step that creates it again.
``RECPRESS_HOME`` is the environment variable with the folder of local files.
"""

SENTENCES = {
    "path_not_relative": "expected a relative path without empty, '.' or '..' parts, got {path!r}",
    "path_characters": "expected a path without backslashes and control characters, got {path!r}",
    "path_not_unicode": "expected a path that UTF-8 can encode, got {path!r}",
    "files_not_sorted": "expected files sorted by path, with each path once",
    "file_and_folder": "expected a file or a folder for each path, but {path!r} is both",
    "blobs_differ": (
        "the blob names do not fit manifest version {version}: version 1 has none; version 2 has "
        "one for each file, computed from the file's chunk hashes"
    ),
    "chunk_count_differs": (
        "expected {expected} chunk hashes for {path!r} of {bytes} bytes, got {got}"
    ),
    "home_not_utf8": "expected a path in UTF-8; rename the folder, or set another path",
    "home_with_null": "expected a path without a null character; remove the character",
    "home_of_unknown_user": "{problem}; set an absolute path",
}
