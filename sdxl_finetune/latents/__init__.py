"""The caches: latents of all images and text encoder outputs of all captions, encoded once, on the disk or in memory.

`prepare` and `prepare_text` are the ways in. They find what exists, encode what is missing, and return a LatentStore
and a TextStore.

    keys        cache keys: which latent belongs to which image, crop and flip
    shards      files of many records
    catalogue   opening thousands of shards at once
    library     many shards as one, in which records are found by key
    records     reading records of shards, with their checksums
    store       reading latents and text encoder outputs by row of the index
    encoding    from image files to latents
    npz         latents that sd-scripts left beside the images
    together    encoding by all processes of a run
    alone       one run at a time encodes into a folder
    preparing   all of this for latents
    captions    all of this for text encoder outputs
    masks       all of this for masks
"""
