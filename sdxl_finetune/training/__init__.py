"""A run: `loop.train` is sdxl-train.

Modules:

    checks      everything that can be checked before weights and pixels are read, all mistakes at once
    setup       builds a run from a config
    learner     model, optimizer and schedules that a training step uses
    learned_weights    the network of learned loss weights, its optimizer and its state
    loop        the training loop
    hooks       previews, validation and saves
    write_saves, failed_saves, space    writing what is saved, storage that refuses it, and the space that it takes
    every, saves    when a hook is due, and under which name something is saved
    guards      processes that watch one another, and a lock of the output
    requests    files and limits of time that ask a run to save or to stop
    state, optimizer_state, resume, stored_saves    training states, also in a store, and continuing from them
    restoring        gives a learner what a training state holds
    stage            the stages of training, for the metadata of checkpoints
    debug_dataset    draws the first batches instead of training
    validation, vae_encoder    the validation loss, and the VAE for the latent cache
    tag_reports      which tags are learned so far
    colours          compares drawn pictures with the images of the same captions
    rank_check       compares the weights of all processes
    dumps, dump_reading, reproduce    steps whose numbers went wrong: written to files, and run again
"""
