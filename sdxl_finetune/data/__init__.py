"""From image files and captions to batches.

Modules:

    contents    the bytes of images in files, tar files and object stores
    sources     folders, metadata files, tar files and object stores as tables of images
    listing     lists the images of each subset from its source
    scan        finds the sizes and captions of all images, and keeps the result in cache_dir
    kept_files  removes what no run has used for long from cache_dir
    mount_points  the folders of an index on a machine that has them at other paths
    tables      writes and maps the Arrow files of scan and index
    buckets     chooses the aspect-ratio bucket, the resized size and the crop
    index       one row for each image, in columns that all processes share; entry is one of them
    marks       quality tags, repeats and loss weights, as scores and rules ask for them, with quality, scores,
                score_files, weights, tag_columns and joined; quality_text sets the tag in one caption
    mask_files  finds the mask file of each image
    remarks     warnings about captions and names of images
    batch_plan  which images form a batch, as a function of seed and epoch
    loader      makes the batches of one rank, in data-loader workers (workers)
    views       how an image is seen at one place of the run: flip, size, crop
    unchanged   images and captions without anything random, for validation and tag reports
    caption_sources  the texts that may become an image's caption, and choosing one
    tags             which tags are protected, and which are dropped together
    caption_lengths  counts the captions that max_token_length cuts off
    captions, tokens, images, masks, faces    one caption, its tokens, one image file, its mask, a crop around a face
"""
