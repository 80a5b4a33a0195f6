"""Sentences about paths in ``model.json`` and about JSON from outside."""

SENTENCES = {
    "path_not_inside": "{path} {reason}; name something inside the folder instead",
    "path_in_subfolder": "{path} lies in a sub-folder; a bundle is flat",
    "draft_path_unusable": "{path} {reason}; give a path below the draft's folder or an absolute "
    "one",
    "manifest_hashes_itself": "{manifest} cannot hold its own hash; its seal line does that",
    "json_too_large": "it has {bytes} bytes, too large: at most {most_bytes}",
    "json_file_too_large": "it is too large: more than {most_bytes} bytes",
    "json_too_deep": "it is nested too deep, more than {most_levels} levels",
    "json_too_many_values": "it has more than {most_values} values",
    "json_number_too_long": "a number in it has more than {most_characters} characters",
}
