# The built-in data: drawn scenes, offline. About two minutes on 2 cores.
data_dir = "data/shapes"
out_dir = "out/shapes"
image_size = 64
patch_size = 8
n_layer_encoder = 3
n_layer_decoder = 2
n_head = 4
n_embd = 128
block_size = 32
batch_size = 32
max_iters = 600
learning_rate = 2e-3
warmup_iters = 50
momentum = 0.99
eval_interval = 300
eval_images = 200
