"""Sources of images. Each gives one table of a subset's images, with the columns of `listed.LISTED`.

Modules:

    listed     the columns, and how a table of them is built
    chunks     columns of the entries of a metadata file, and how caption and tags are joined
    entries    .json and .jsonl metadata files
    parquet    Parquet metadata files
    metadata   entries of either kind as one table, with their mistakes counted
    names      files of names without ending, and names that come twice
    joining    entries that name images in tar files or below an address
    folders    files directly in a folder or below an address
    beside     texts that stand beside an image in a tar file or an object store
    tar_files  images and texts in one tar file, by position
    tars       images in all tar files of a subset
    objects    images below an address in an object store
"""
