"""Read HDF5 files safely (limits and links are checked) and fast (chunks are read outside h5py's lock).

``probe`` tries a file in a process of its own, ``safe`` opens it, ``limits`` bounds what it may claim; ``arrays`` reads
numbers, ``direct`` without the page cache, ``table`` reads obs and var, ``text`` their strings, and ``signature``
hashes them as they are stored.
"""
