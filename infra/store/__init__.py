"""The object store: content-addressed artifacts in a folder or ``s3://bucket/prefix``.

A blob is a stored file whose key is a hash of its content; a manifest lists the files of an
artifact and the hashes of their chunks.

disk.py          translates an OSError into an error class of this project
lock.py          locks between processes of one machine
temporary.py     temporary files whose names identify the process that created them
backend.py       the protocol of a key-value storage backend; selects folder or bucket
folder.py        the backend for a local folder
s3.py            the backend for an S3 bucket
manifest.py      the manifest of an artifact: file sizes, chunk hashes, and the artifact's name
chunks.py        reads and hashes files in chunks
artifact_files.py   stores each file of an artifact once by content, and verifies it when read
artifact_writer.py  writes a large artifact block by block, and resumes after a kill
object_store.py  the class Store: stores, reads and verifies artifacts and small records
records.py       small JSON records that end with a checksum
"""
