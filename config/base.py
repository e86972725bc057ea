# Flickr30k at 224 pixels, for one GPU with 24 GB or more. Not run yet.
#   python prepare_flickr.py --image_size 256 --out_dir data/flickr30k-256
data_dir = "data/flickr30k-256"
out_dir = "out/base"
max_iters = 20000
image_size = 224
patch_size = 16
n_layer_encoder = 8
n_layer_decoder = 6
n_head = 8
n_embd = 512
block_size = 96
dropout = 0.1
batch_size = 128
crop = 0.5
flip = True
alpha = 0.4
smoothing = 0.1
optimizer = "adamw"
learning_rate = 6e-4
warmup_iters = 1000
compile = True
eval_interval = 1000
