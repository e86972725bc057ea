# A frozen ViT-B/16 (85.8M parameters) and GPT-2. Trains GPT-2's 124M parameters (minus the
# unused part of the vocabulary) and 28M of new cross-attention. Not run on real weights yet.
#   python prepare_flickr.py --image_size 224 --tokenizer gpt2 --keep_used \
#       --out_dir data/flickr30k-gpt2
data_dir = "data/flickr30k-gpt2"
out_dir = "out/gpt2_vit"
encoder = "google/vit-base-patch16-224-in21k"
freeze_encoder = True
# the image, its mirror image and six random crops; storing their features would take 70 GB
views = 8
cache_features = False
decoder = "gpt2"
image_size = 224
block_size = 96
max_iters = 10000
batch_size = 64
learning_rate = 5e-5
# cross-attention is new, so it gets a higher learning rate
lr_scale = "cross=10"
warmup_iters = 500
dropout = 0.1
flip = True
crop = 0.7
eval_interval = 1000
