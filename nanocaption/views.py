"""
Fixed views of each image, so that a frozen encoder's features can be stored and reused.

View 0 is the image itself. With flip, view 1 is its mirror image (the image itself, if a caption
says left or right). All others are random crops with flip and jitter, drawn from (seed, image,
view). An epoch uses one view of each image, drawn from (seed, epoch, image).
"""
import numpy as np
import torch

from nanocaption.augment import augment
from nanocaption.cli import UserError
from nanocaption.features import Features, compute_features, feature_key, weights_hash

CPU_BATCH = 4  # images: convolutions are fastest while their activations fit into the cache


def check_views(options):
    """Raises UserError if the number of views does not fit the augmentation options."""
    if not options.freeze_encoder:
        return
    is_random = options.crop < 1 or options.jitter > 0
    n_fixed = 1 + options.flip  # the image, and its mirror image
    needed = n_fixed + is_random
    if options.views < needed:
        raise UserError("with freeze_encoder, the encoder sees a few fixed views of each image; "
                        f"this augmentation needs at least --views={needed}, not "
                        f"{options.views}")
    if options.views > n_fixed and not is_random:
        raise UserError(f"--views={options.views} needs crop < 1 or jitter > 0: without them, "
                        f"the number of distinct views is {n_fixed}")


def pick_views(index, epochs, options):
    """Which view of each image its epoch uses, int (B,)."""
    views = []
    for i, epoch in zip(index, epochs):
        rng = np.random.default_rng((options.seed, int(epoch), int(i)))
        views.append(rng.integers(options.views))
    return np.array(views)


def make_view(images, index, view, may_flip, options):
    """One view of uint8 images (B, S, S, 3); may_flip: bool (B,)."""
    if view == 0:
        return images
    if view == 1 and options.flip:
        flip = torch.from_numpy(may_flip).to(images.device)[:, None, None, None]
        return torch.where(flip, images.flip(2), images)
    seeds = [(options.seed, int(i), view) for i in index]
    return augment(images, seeds, may_flip, options)


class FrozenViews:
    """
    The frozen encoder's features of one split's views, float16 (n, C) for each image and view.

    Every read computes them, unless fill has stored all of them in data_dir/features-KEY/.
    may_flip: bool (N,).
    """

    def __init__(self, model, split, may_flip, options, n_view):
        self.model = model
        self.split = split
        self.may_flip = may_flip
        self.options = options
        self.n_view = n_view
        self.features = None

    @torch.no_grad()
    def compute(self, index, view):
        """The features of one view of these images, float16 (len(index), n, C)."""
        training = self.model.training
        self.model.eval()
        device = self.model.mean.device
        size = CPU_BATCH if device.type == "cpu" else len(index)
        parts = []
        for start in range(0, len(index), size):
            part = np.asarray(index[start:start + size])
            images = torch.from_numpy(self.split.read_images(part)).to(device)
            images = make_view(images, part, view, self.may_flip[part], self.options)
            with torch.autocast(device.type, enabled=False):
                features = self.model.encoder.features(self.model.normalize(images))
            parts.append(features.half().cpu().numpy())
        self.model.train(training)
        return np.concatenate(parts)

    def read(self, index, views):
        """The features of these images and views, int (B,) each -> float32 (B, n, C) on the CPU."""
        if self.features:
            return torch.from_numpy(self.features.read(index, views)).float()
        index = np.asarray(index)
        views = np.asarray(views)
        rows = [None] * len(index)
        for view in np.unique(views):
            places = np.flatnonzero(views == view)
            for place, row in zip(places, self.compute(index[places], int(view))):
                rows[place] = row
        return torch.from_numpy(np.stack(rows)).float()

    def fill(self, data, rank, world):
        """Computes this split's features that are not stored yet; from now on, read loads them."""
        options = self.options
        facts = dict(
            data=data.fingerprint,
            weights=weights_hash(self.model.encoder),
            normalization=[self.model.mean.tolist(), self.model.std.tolist()],
            image_size=options.image_size,
            views=self.n_view,
        )
        if self.n_view > 1:
            # raise version whenever augment draws other views
            facts |= dict(seed=options.seed, crop=options.crop, flip=options.flip,
                          jitter=options.jitter, version=2)
        folder = f"{data.data_dir}/features-{feature_key(facts)}"
        shape = (len(self.split), self.n_view, *self.compute([0], 0).shape[1:])
        features = Features(folder, self.split.name, shape)
        what = f"{shape[0]:,} {self.split.name} images x {self.n_view} views"
        compute_features(features, self.compute_all, what, rank, world)
        self.features = features

    def compute_all(self, index):
        """The features of all views of these images, float16 (len(index), V, n, C)."""
        return np.stack([self.compute(index, view) for view in range(self.n_view)], axis=1)


def fill_views(train_views, val_views, data, rank, world):
    """Computes and stores the features of both splits; see FrozenViews.fill."""
    train_views.fill(data, rank, world)
    val_views.fill(data, rank, world)
