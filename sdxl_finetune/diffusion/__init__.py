"""The mathematics of training, as pure functions: one function for one equation, with its source.

Modules:

    objective     the three objectives: input, target, and the latents that follow from a prediction
    schedule      how much signal and noise the input has at a timestep
    noise         draws the noise (offset, multires and input noise)
    pairing       gives each image the noise that it is trained with
    timesteps     draws the timesteps
    loss          the loss of each element
    loss_weights  the weight of each image's loss, by its timestep
    learned_weights    the network that learns such weights, and its loss
    image_loss    all of these together: the loss of each image of a batch
"""
