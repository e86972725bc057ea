# CLIP's ViT-B/16, at a tenth of the learning rate, and GPT-2; otherwise as config/gpt2_vit.py.
#   python prepare_flickr.py --image_size 224 --tokenizer gpt2 --keep_used --out_dir data/flickr30k-gpt2
# Not run on the real weights yet (they could not be downloaded where this was written): no cost or result to state.
data_dir = "data/flickr30k-gpt2"
out_dir = "out/gpt2_clip"
encoder = "openai/clip-vit-base-patch16"
decoder = "gpt2"
image_size = 224
block_size = 96
max_iters = 10000
batch_size = 64
learning_rate = 5e-5
lr_scale = "^encoder=0.1 cross=10"
warmup_iters = 500
dropout = 0.1
flip = True
crop = 0.7
eval_interval = 1000
