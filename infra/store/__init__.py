"""The object store: a folder or ``s3://bucket/prefix``, content-addressed, verified.

disk.py          translates errors of the local disk
lock.py          locks between processes of one machine
temporary.py     temporary files whose names identify their process
place.py         the protocol of a place that stores keys
folder.py        a place in a local folder
s3.py            a place in an S3 bucket
manifest.py      the manifest of an artifact: files, chunk hashes, root
chunks.py        reads and hashes files in chunks
draft.py         writes an artifact block by block
artifact_files.py  the files of artifacts: written once by content, read verified
object_store.py  stores, reads and verifies artifacts
records.py       small JSON records with a seal over their bytes
"""
