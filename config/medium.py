# The bundled checkpoint's recipe, with config/medium_scst.py: like config/small.py, but with ten
# trained blocks instead of five and eight views instead of four.
data_dir = "data/flickr8k-260"
out_dir = "out/medium"
encoder = "efficientnet_lite2"
freeze_encoder = True
tune_blocks = 10
lr_scale = "encoder.network=0.1 encoder.stem.last=0.1"
views = 8
flip = True
crop = 0.6
jitter = 0.2
n_layer_encoder = 1
n_layer_decoder = 3
n_head = 4
n_embd = 256
block_size = 48
dropout = 0.3
word_dropout = 0.15
smoothing = 0.1
batch_size = 64
max_iters = 800
optimizer = "muon"
learning_rate = 1e-3
weight_decay = 0.1
warmup_iters = 50
eval_interval = 400
