"""The latent cache: latents of all images of an index, encoded once, on the disk or in memory.

`prepare` is the way in. It finds the latents that exist, encodes the missing ones, and returns a LatentStore.

    keys        cache keys: which latent belongs to which image, crop and flip
    shards      files of many latents, in which latents are found by key
    store       reading latents by row of the index
    encoding    from image files to latents
    npz         latents that sd-scripts left beside the images
    masks       the masks of images, at the size of latents
    preparing   all of this over all processes of a run
"""
