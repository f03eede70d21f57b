"""SDXL and its checkpoints.

Modules:

    sdxl          U-Net and both text encoders as one module; text and vae are the other parts
    architecture  widths and depths, read from the shapes of a checkpoint
    latent_scale, vae_file    shift and scale of latents, and where files say them
    adapt         a model for the latents of another VAE
    keymap        one table between module names and checkpoint keys, used in both directions
    load, save    checkpoints as .safetensors, .ckpt or diffusers folder
    tensorfile, named_tensors, diffusers_folder, tokenizer_files    the parts of loading and saving
    weights       all tensors of a model, as writers are given them
    declared      says which objective a checkpoint was trained with, and has its marker tensors
    interfaces, unconditional    say what user interfaces take a checkpoint for, and what an empty prompt means in them
    merge, averaging    weighted sums of models, and the weights that approximate an EMA
    identify      says which model a file holds, if it is not SDXL
    attention, compilation    gradient checkpointing, xformers, torch.compile
    random_model  small models with random weights
"""
