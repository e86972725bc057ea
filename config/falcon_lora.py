# Falcon-7B with LoRA behind a frozen CLIP ViT-B/16, for one 80 GB GPU. Not run on real weights yet.
#   python prepare_flickr.py --image_size 224 --tokenizer tiiuae/falcon-7b \
#       --out_dir data/flickr30k-falcon
# The image is a soft prompt of 32 vectors. Memory, calculated: 6.92B frozen parameters in
# bfloat16 take 13.8 GB, shared by student and teacher. LoRA of rank 16 adds 33M parameters; with
# gradients, two moments and the teacher's copy they take 0.7 GB in float32. recompute keeps only
# the blocks' inputs, 32 x 8 images x (5 captions of 15 tokens + 32) x 4,544 x 2 bytes = 0.25 GB,
# and the activations of one block.
data_dir = "data/flickr30k-falcon"
out_dir = "out/falcon_lora"
encoder = "openai/clip-vit-base-patch16"
freeze_encoder = True
cache_features = False  # the features would take 9 GB
decoder = "tiiuae/falcon-7b"
lora_rank = 16
bridge = "prefix"
n_query = 32
image_size = 224
block_size = 128
max_iters = 5000
batch_size = 64
grad_accum = 8
recompute = True
dtype = "bfloat16"
learning_rate = 2e-4
warmup_iters = 200
eval_interval = 1000
eval_images = 200
