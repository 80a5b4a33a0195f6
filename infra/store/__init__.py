"""The object store: a folder or ``s3://bucket/prefix``, content-addressed, verified.

disk.py          what an error of the local disk means
lock.py          locks between processes of one machine
temporary.py     temporary files that name their process
place.py         what a place for keys offers
folder.py        a folder as such a place
s3.py            a bucket as such a place
manifest.py      what an artifact consists of
chunks.py        files as hashed chunks
draft.py         an artifact while it is written
object_store.py  artifacts: put, read, verify
records.py       small records with a seal over their bytes
"""
