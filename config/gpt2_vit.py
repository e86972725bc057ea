# A frozen ViT-B/16 and GPT-2: 85.8 M frozen, 124 M less the unused part of the vocabulary and 28 M of cross-attention trained.
#   python prepare_flickr.py --image_size 224 --tokenizer gpt2 --keep_used --out_dir data/flickr30k-gpt2
# Not run on the real weights yet (they could not be downloaded where this was written): no cost or result to state.
data_dir = "data/flickr30k-gpt2"
out_dir = "out/gpt2_vit"
encoder = "google/vit-base-patch16-224-in21k"
freeze_encoder = True
decoder = "gpt2"
image_size = 224
block_size = 96
max_iters = 10000
batch_size = 64
learning_rate = 5e-5
lr_scale = "cross=10"  # what is new learns faster
warmup_iters = 500
dropout = 0.1
flip = True
crop = 0.7
eval_interval = 1000
