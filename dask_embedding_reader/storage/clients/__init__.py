"""What the clients of fsspec can do beyond fsspec, one file each: a read that tells which version its bytes are of.

``any`` holds what all file systems of fsspec have, but do not promise. Private names of other libraries are here and in
``direct`` only, each with the versions that it was seen in; where one is gone, files are read by ``cat_file``.
"""
