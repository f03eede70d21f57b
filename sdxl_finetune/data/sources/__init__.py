"""Sources of images: each gives one table of a subset's images, with the columns of `listed.LISTED`.

listed      the columns, and how a table of them is built
entries     .json and .jsonl metadata files, as chunks of columns
parquet     Parquet metadata files, as chunks of columns
metadata    checks the chunks of either, and joins them into one table
names       finds the files of names without ending, and names that come twice
tar_files   the images and texts in one tar file, by position
tars        the images of all tar files of a subset
objects     the images below an address in an object store
"""
