"""Messages of errors in paths of ``model.json``, and in JSON text that recpress did not write.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.

The code that reads JSON puts the location before its message: ``model.json: it is too large``. A
draft is a bundle's ``model.json`` before the bundle is packed; it may name files elsewhere. The
manifest is the packed ``model.json``; its last field, ``seal``, is the SHA-256 of the text before
it. A field ``reason`` is a clause of ``reasons/bundles.py``, such as "is absolute".
"""

SENTENCES = {
    "path_not_inside": "{path} {reason}; use a path inside the folder",
    "path_in_subfolder": (
        "{path} is in a subfolder, but a bundle has none; move the file to the top folder"
    ),
    "draft_path_unusable": "{path} {reason}; give a path below the draft's folder or an absolute "
    "one",
    "manifest_hashes_itself": (
        "{manifest} cannot contain its own hash, which is its last field, 'seal'"
    ),
    "json_too_large": "it is too large: it has {bytes} bytes, at most {most_bytes} are allowed",
    "json_file_too_large": "it is too large: it has more than {most_bytes} bytes",
    "json_too_deep": "it is nested too deeply: more than {most_levels} levels",
    "json_too_many_values": "it has more than {most_values} values",
    "json_number_too_long": "a number in it has more than {most_characters} characters",
}
