"""Sentences about the manifests of stored artifacts, and about ``RECPRESS_HOME``."""

SENTENCES = {
    "path_not_relative": "{path!r} is not a relative path that stays in its folder",
    "path_characters": "{path!r} has a backslash or a control character",
    "path_not_unicode": "{path!r} is not valid Unicode",
    "files_not_sorted": "the files are not sorted by path, or a path occurs twice",
    "file_and_folder": "{path!r} is both a file and a folder",
    "blobs_differ": "the blobs of a manifest of version {version} do not match its files",
    "chunk_count_differs": "{path!r} of {bytes} bytes needs {expected} chunk hashes, got {got}",
    "home_not_utf8": "the path is not valid UTF-8",
    "home_with_null": "the path has a null character",
    "home_of_unknown_user": "{problem}; set an absolute path",
}
