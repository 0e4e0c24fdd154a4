r"""08 - Theory checks: every claim of the course, a number.

Paper    each claim names its source; "course" is the coursework whose answers are checked.
Idea     a claim predicts a number; compute it a second way; holds if they agree      -> agree()
         Functions to paste, each above the claims that use it: receptive_field,
         conv2d_grad_input, conv2d_grad_weight, dropout_mask_average, dice_from_iou, mlp_grads,
         numeric_grad, coupling_log_prob, truncated_normal_variance, merge_batch_statistics, ...
See      the table claim / expected / measured / verdict: 63 claims, 45 hold, 18 are refuted by a
         counterexample, each with 5 seeds. Exit status 1 if a verdict is not the expected one.
         receptive_field.png, saturation.png, finite_difference.png, js_w1.png, bilinear.png,
         three_points.png, fingerprints.png.
Time     23 s on 2 CPU cores; --quick, one seed, 14 s.
Differs  float64 on the CPU, but where float32 is enough (GLO, counts, small whole numbers); the
         shared flags for data, device and resuming do nothing here.
Run      python 08_theory_checks.py --list
         python 08_theory_checks.py --only optimal-d double-sigmoid
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F

import common

SEEDS = 5              # a verdict counts only if all of them agree
ROUNDING = 1e-10       # float64 keeps 16 digits; what is exact on paper agrees to at least 10
THREE_POINTS, THREE_WEIGHTS = (-3 ** 0.5, 0.0, 3 ** 0.5), (1 / 6, 2 / 3, 1 / 6)  # a law


# --- the idea ----------------------------------------------------------------------------------

class Outcome(NamedTuple):
    """Both sides of a claim, as text, and whether they agree."""
    expected: str   # what the claim predicts
    measured: str   # what comes out
    holds: bool


class Claim(NamedTuple):
    """A claim: its topic, the check, and the verdict that it must give."""
    topic: str
    check: object
    holds: bool


CLAIMS = {}  # by id, in the order of this file


def claim(topic, name, holds=True):
    """Registers a check under an id. holds=False: the claim is wrong, the check refutes it."""
    def register(check):
        CLAIMS[name] = Claim(topic, check, holds)
        return check
    return register


def agree(expected, measured, unit="", tolerance=ROUNDING):
    """Outcome of two numbers: they differ by at most `tolerance` times max(1, |expected|)."""
    return Outcome(f"{expected:.6g} {unit}".strip(), f"{measured:.6g} {unit}".strip(),
                   abs(measured - expected) <= tolerance * max(1, abs(expected)))


def equal(*pairs):
    """Outcome of pairs of tensors that must be equal: the largest difference must be rounding."""
    worst = max((a - b).abs().max().item() for a, b in pairs)
    return Outcome("difference 0", f"difference {worst:.0e}" if worst else "difference 0",
                   worst <= ROUNDING)


def normal(*shape):
    """Standard normal float64 tensor."""
    return torch.randn(*shape, dtype=torch.float64)


def gradient(f, *inputs):
    """∂f/∂input for each of `inputs` by autograd: one side of many checks, never both."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(f(*inputs), inputs)
    return grads[0] if len(grads) == 1 else grads


# --- layers ------------------------------------------------------------------------------------

ALEXNET = [(11, 4, 2, 1), (3, 2, 0, 1), (5, 1, 2, 1), (3, 2, 0, 1), *3 * [(3, 1, 1, 1)],
           (3, 2, 0, 1)]
CONV, POOL = (3, 1, 1, 1), (2, 2, 0, 1)
VGG_A = [CONV, POOL, CONV, POOL, *3 * [CONV, CONV, POOL]]
VGG_16 = [*2 * [CONV, CONV, POOL], *3 * [CONV, CONV, CONV, POOL]]
MOBILENET = [(3, s, 1, 1) for s in (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)]  # 1x1 add nothing
DCGAN_D = [*4 * [(4, 2, 1, 1)], (4, 1, 0, 1)]


def resnet_50(stride_in):
    """The longest path through ResNet-50, with the stride of a stage in its first 1x1 or 3x3."""
    layers = [(7, 2, 3, 1), (3, 2, 1, 1)]
    for blocks, stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
        for s in [stride] + [1] * (blocks - 1):
            layers += [(1, s, 0, 1), CONV] if stride_in == "1x1" else [(3, s, 1, 1)]
    return layers


def receptive_field(layers):
    """r_k = r_{k-1} + (g_k - 1) Π_{i<k} s_i,  g = dilation (kernel - 1) + 1.

    layers: (kernel, stride, padding, dilation) from the input on, one side of each convolution or
    pooling. Returns (size, stride, padding) of the stack seen as one layer: output j looks at the
    inputs j stride - padding ... j stride - padding + size - 1. An empty stack is (1, 1, 0).
    """
    size, stride, padding = 1, 1, 0
    for kernel, s, p, dilation in layers:
        size += dilation * (kernel - 1) * stride
        padding += p * stride
        stride *= s
    return size, stride, padding


def seen_inputs(layers, j, n):
    """Oracle: first and last of n inputs on which output j of a positive 1-D network depends."""
    def output(x):
        for kernel, stride, padding, dilation in layers:
            x = F.conv1d(x, torch.ones(1, 1, kernel).to(x), None, stride, padding, dilation)
        return x[0, 0, j]

    seen = gradient(output, torch.ones(1, 1, n, dtype=torch.float64))[0, 0].nonzero()
    return seen.min().item(), seen.max().item()


@claim("layers", "rf-recursion")
def check_rf_recursion():
    """r_k = r_{k-1} + (g_k - 1) Π_{i<k} s_i, g = dilation (kernel - 1) + 1.

    Course: yes. One step at layer k is Π_{i<k} s_i steps at the input, and a kernel takes g - 1 of
    them. Oracle: where the gradient of one output is not zero, in 20 random positive networks.
    """
    right = 0
    for _ in range(20):
        layers = [tuple(torch.randint(low, high, ()).item()
                        for low, high in ((1, 5), (1, 4), (0, 3), (1, 4)))
                  for _ in range(torch.randint(1, 5, ()))]
        size, stride, padding = receptive_field(layers)
        j = -(-padding // stride)  # the first output that looks at no padding
        first = j * stride - padding
        right += seen_inputs(layers, j, 2 * (first + size)) == (first, first + size - 1)
    return agree(20, right, "of 20 networks")


@claim("layers", "rf-nets")
def check_rf_nets():
    """Receptive fields: AlexNet 195, VGG-16 212, MobileNet v1 315, DCGAN's D 94, ResNet-50 427.

    ResNet-50 is 483 with the stride in the first 1x1 of a stage (He et al. 2016) and 427 with it in
    the 3x3 (torchvision): a stride counts from the layer after it on.
    """
    nets = [ALEXNET, VGG_16, MOBILENET, DCGAN_D, resnet_50("3x3"), resnet_50("1x1")]
    sizes = [receptive_field(net)[0] for net in nets]
    return Outcome("195 212 315 94 427 483", " ".join(map(str, sizes)),
                   sizes == [195, 212, 315, 94, 427, 483])


def sizes_per_layer(net):
    """Receptive field after each layer, as text."""
    return " ".join(str(receptive_field(net[:i])[0]) for i in range(1, len(net) + 1))


@claim("layers", "rf-alexnet")
def check_rf_alexnet():
    """AlexNet's conv1, pool1, conv2, pool2, conv3, conv4, conv5, pool5 see 11 to 195 pixels.

    The first layers' strides (4 and 2) are why it sees most of its 224 pixels after five
    convolutions: each later 3x3 adds 32.
    """
    expected = "11 19 51 67 99 131 163 195"
    return Outcome(expected, sizes_per_layer(ALEXNET), sizes_per_layer(ALEXNET) == expected)


@claim("layers", "rf-vgg-a")
def check_rf_vgg_a():
    """The 8 convolutions and 5 poolings of VGG-A, in their order, see 3 to 150 pixels.

    Small kernels, so growth comes from the poolings: a 3x3 adds 2, 4, 8, 16, 32 pixels.
    """
    expected = "3 4 8 10 18 26 30 46 62 70 102 134 150"
    return Outcome(expected, sizes_per_layer(VGG_A), sizes_per_layer(VGG_A) == expected)


GROWTH = {"plain": 4 * [(3, 1, 1, 1)], "stride 2": 4 * [(3, 2, 1, 1)],
          "pooling": 4 * [CONV, POOL], "dilation": [(3, 1, d, d) for d in (1, 2, 4, 8)]}


@claim("layers", "rf-growth")
def check_rf_growth():
    """Stride and pooling multiply all later growth and cost resolution; dilation costs none.

    Course: yes. Four 3x3 convolutions: size and stride of the stack, so one output for every
    `stride` pixels. Dilation 1, 2, 4, 8 reaches as far as stride 2 and keeps every pixel.
    """
    found = [receptive_field(net)[:2] for net in GROWTH.values()]
    text = ", ".join(f"{name} {size}/{stride}" for name, (size, stride) in zip(GROWTH, found))
    return Outcome("9/1, 31/16, 46/16, 31/1", text, found == [(9, 1), (31, 16), (46, 16), (31, 1)])


@claim("layers", "residual-filters")
def check_residual_filters():
    """In y = f(x) + x the best linear filter f is the plain best filter minus the identity kernel.

    Course: "it learns the difference", after He et al. 2016. Least squares on noisy targets; exact
    for one linear convolution, because f(x) + x is again one.
    """
    x = normal(8, 1, 12, 12)
    y = F.conv2d(x, normal(1, 1, 3, 3)) + 0.3 * normal(8, 1, 10, 10)
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 9)
    plain = torch.linalg.lstsq(patches, y.reshape(-1, 1)).solution
    residual = torch.linalg.lstsq(patches, (y - x[..., 1:-1, 1:-1]).reshape(-1, 1)).solution
    identity = torch.eye(9, dtype=torch.float64)[:, 4:5]  # 1 in the middle of the 3x3
    return equal((residual, plain - identity))


def masks(n, p):
    """All 2^n dropout masks [2^n, n] of zeros and ones, and their probabilities [2^n]."""
    m = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    return m, (m * (1 - p) + (1 - m) * p).prod(dim=1)


def dropout_mask_average(x, p, f=lambda x: x):
    """Exact E f(x m / (1 - p)) over all 2^n masks m; each entry of x [n] is kept with 1 - p.

    f maps [n] to a tensor; the identity if left out. n up to about 15, 0 <= p < 1.
    """
    m, probability = masks(len(x), p)
    return sum(w * f(x * kept / (1 - p)) for w, kept in zip(probability, m))


@claim("layers", "dropout-scale")
def check_dropout_scale():
    """Scaling by 1/(1 - p) keeps the expectation: E dropout(x) = x.

    Course: yes. (1 - p) x / (1 - p) + p 0 = x; here as the exact average over all masks, and as a
    mean over 10,000 draws of torch's dropout, within 6 standard deviations of a mean.
    """
    x, p, n = normal(8), 0.3, 10_000
    exact = dropout_mask_average(x, p)
    drawn = F.dropout(x.expand(n, -1), p).mean(dim=0)
    within = (drawn - x).abs() <= 6 * x.abs() * (p / (1 - p) / n) ** 0.5
    outcome = equal((exact, x))
    return outcome._replace(holds=outcome.holds and bool(within.all()))


@claim("layers", "dropout-merge")
def check_dropout_merge():
    """Dropout(p1) then Dropout(p2) is Dropout(1 - (1 - p1)(1 - p2)).

    Course: not written out. A unit stays if it stays twice. Probability of each of the 2^4
    joint masks, summed over all pairs of masks, against the law of the single dropout.
    """
    n, p1, p2 = 4, 0.2, 0.5
    (m1, w1), (m2, w2) = masks(n, p1), masks(n, p2)
    kept = (m1[:, None] * m2[None]).flatten(0, 1)
    m, single = masks(n, 1 - (1 - p1) * (1 - p2))
    law = torch.stack([(w1[:, None] * w2).flatten()[(kept == one).all(dim=1)].sum() for one in m])
    return equal((law, single))


@claim("layers", "dropout-place", holds=False)
def check_dropout_place():
    """Dropout must come after the activation, not before.

    Course: false, and it is. For the same mask relu(x m) = relu(x) m: ReLU cannot tell. A sigmoid
    can: it turns a dropped 0 into 1/2.
    """
    x, m = normal(100), (torch.rand(100) < 0.5).double()
    relu, sigmoid = ((f(x * m) - f(x) * m).abs().max().item() for f in (torch.relu, torch.sigmoid))
    return Outcome("order matters", f"ReLU {relu:g}, sigmoid {sigmoid:g}",
                   not (relu == 0 and sigmoid > 0))


def pair(value):
    """2 -> (2, 2); pairs stay."""
    return (value, value) if isinstance(value, int) else tuple(value)


def strided_view(x, u, v, size, stride, dilation):
    """The pixels of x [B, C, H, W] that kernel entry (u, v) meets, one for each output [H', W']."""
    top, left = u * dilation[0], v * dilation[1]
    return x[:, :, top:top + (size[0] - 1) * stride[0] + 1:stride[0],
             left:left + (size[1] - 1) * stride[1] + 1:stride[1]]


def conv2d_grad_input(input_size, weight, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """∂L/∂x of y = conv2d(x, weight): each ∂L/∂y goes back, times w, to the pixels it came from.

    ∂L/∂x[c, i s + u d - p] += Σ_o weight[o, c, u, v] ∂L/∂y[o, i]. Arguments and result as in
    torch.nn.grad.conv2d_input: input_size [B, C, H, W], weight [O, C / groups, h, w], grad_output
    [B, O, H', W']; stride, padding and dilation are a number or a pair.
    """
    stride, (ph, pw), dilation = pair(stride), pair(padding), pair(dilation)
    b, c, h, w = input_size
    padded = grad_output.new_zeros(b, c, h + 2 * ph, w + 2 * pw)
    grad = grad_output.unflatten(1, (groups, -1))        # [B, g, O/g, H', W']
    for u, v in itertools.product(*map(range, weight.shape[2:])):
        w_uv = weight[:, :, u, v].unflatten(0, (groups, -1))  # [g, O/g, C/g]
        part = torch.einsum("bgohw,goc->bgchw", grad, w_uv).flatten(1, 2)
        strided_view(padded, u, v, grad_output.shape[2:], stride, dilation).add_(part)
    return padded[:, :, ph:ph + h, pw:pw + w]


def conv2d_grad_weight(input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """∂L/∂w of y = conv2d(input, w): each weight meets a strided view of the image.

    ∂L/∂w[o, c, u, v] = Σ_{b, i} input[b, c, i s + u d - p] ∂L/∂y[b, o, i]. Arguments and result as
    in torch.nn.grad.conv2d_weight: input [B, C, H, W], weight_size [O, C / groups, h, w].
    """
    stride, (ph, pw), dilation = pair(stride), pair(padding), pair(dilation)
    padded = F.pad(input, (pw, pw, ph, ph))
    grad = grad_output.unflatten(1, (groups, -1))        # [B, g, O/g, H', W']
    grad_weight = grad_output.new_zeros(weight_size)
    for u, v in itertools.product(*map(range, weight_size[2:])):
        seen = strided_view(padded, u, v, grad_output.shape[2:], stride, dilation)
        grad_weight[:, :, u, v] = torch.einsum("bgohw,bgchw->goc", grad,
                                               seen.unflatten(1, (groups, -1))).flatten(0, 1)
    return grad_weight


def true_convolution(a, b, padding=0):
    """a * b with the kernel turned round, a [1, 1, H, W], b [1, 1, h, w]; conv2d correlates."""
    return F.conv2d(a, b.flip(2, 3), padding=padding)


@claim("layers", "conv-grad-input")
def check_conv_grad_input():
    """If y is the cross-correlation of image I and filter f, then ∂L/∂I = grad * f.

    Course: grad * f. Right where * is the true convolution ("full", so padded by h - 1) and the
    layer correlates, as conv2d does; read as a correlation too it is wrong. conv2d_grad_input is
    the general form: strides, padding, dilation, groups.
    """
    image, f, grad = normal(1, 1, 7, 6), normal(1, 1, 3, 3), normal(1, 1, 5, 4)
    by_autograd = gradient(lambda x: (F.conv2d(x, f) * grad).sum(), image)
    other_reading = F.conv2d(grad, f, padding=2)
    x, weight, out = normal(2, 4, 9, 8), normal(6, 2, 3, 3), normal(2, 6, 5, 4)
    how = dict(stride=2, padding=1, groups=2)
    outcome = equal((by_autograd, true_convolution(grad, f, padding=2)),
                    (by_autograd, conv2d_grad_input(image.shape, f, grad)),
                    (gradient(lambda x: (F.conv2d(x, weight, **how) * out).sum(), x),
                     conv2d_grad_input(x.shape, weight, out, **how)))
    wrong = (by_autograd - other_reading).abs().max().item()
    return outcome._replace(measured=f"{outcome.measured} (correlation: {wrong:.1f})",
                            holds=outcome.holds and wrong > 0.1)


@claim("layers", "conv-grad-weight")
def check_conv_grad_weight():
    """If y is the cross-correlation of image I and filter f, then ∂L/∂f = I * flip(grad).

    Course: I * flip(grad). Right where * is the true convolution: turned round twice, that is the
    correlation of image and gradient. Without the flip it is wrong.
    """
    image, f, grad = normal(1, 1, 7, 6), normal(1, 1, 3, 3), normal(1, 1, 5, 4)
    by_autograd = gradient(lambda w: (F.conv2d(image, w) * grad).sum(), f)
    x, weight, out = normal(2, 4, 9, 8), normal(6, 2, 3, 3), normal(2, 6, 5, 4)
    how = dict(stride=2, padding=1, groups=2)
    outcome = equal((by_autograd, true_convolution(image, grad.flip(2, 3))),
                    (by_autograd, conv2d_grad_weight(image, f.shape, grad)),
                    (gradient(lambda w: (F.conv2d(x, w, **how) * out).sum(), weight),
                     conv2d_grad_weight(x, weight.shape, out, **how)))
    wrong = (by_autograd - true_convolution(image, grad)).abs().max().item()
    return outcome._replace(measured=f"{outcome.measured} (no flip: {wrong:.1f})",
                            holds=outcome.holds and wrong > 0.1)


@claim("layers", "conv-transpose")
def check_conv_transpose():
    """The gradient of a convolution with respect to its input is a transposed convolution.

    Course: yes. Stride 2 in the layer becomes a fractional stride in its gradient; output_padding
    restores the row that the stride skipped.
    """
    x, w, grad = normal(2, 3, 8, 8), normal(4, 3, 3, 3), normal(2, 4, 4, 4)
    by_autograd = gradient(lambda x: (F.conv2d(x, w, stride=2, padding=1) * grad).sum(), x)
    return equal((by_autograd, F.conv_transpose2d(grad, w, stride=2, padding=1, output_padding=1)))


@claim("layers", "activation-jacobian")
def check_activation_jacobian():
    """Back through an elementwise activation is elementwise multiplication by its derivative.

    Course: yes. The Jacobian is diagonal: y_i depends on x_i alone. tanh' = 1 - tanh².
    """
    x, grad = normal(6), normal(6)
    jacobian = jacrev(torch.tanh)(x)
    derivative = 1 - torch.tanh(x) ** 2
    return equal((jacobian, torch.diag(derivative)), (grad @ jacobian, grad * derivative))


@claim("layers", "embedding")
def check_embedding():
    """nn.Embedding(n, d) is one_hot @ W; indices of shape S give shape S + (d,).

    Course: asked, not answered. So are the gradients: a row's gradient is the sum over the places
    where its index occurs. Looking rows up only saves the multiplication by zeros.
    """
    w, index, grad = normal(5, 3), torch.randint(5, (2, 4)), normal(2, 4, 3)
    one_hot = F.one_hot(index, 5).double()
    looked_up = gradient(lambda w: (F.embedding(index, w) * grad).sum(), w)
    multiplied = gradient(lambda w: (one_hot @ w * grad).sum(), w)
    return equal((F.embedding(index, w), one_hot @ w), (looked_up, multiplied))


def self_attention(x, w_q, w_k, w_v):
    """softmax(Q Kᵀ / √d) V with Q = x w_q, K = x w_k, V = x w_v, x [n, d] (Vaswani 2017, eq. 1).

    Returns the outputs [n, d] and the weights [n, n], whose rows sum to 1.
    """
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    weights = (q @ k.T / k.shape[1] ** 0.5).softmax(dim=1)
    return weights @ v, weights


@claim("layers", "attention-order")
def check_attention_order():
    """Self-attention without positions is permutation-equivariant; outputs are averages of values.

    Course: asked, not answered. Nothing in softmax(Q Kᵀ / √d) V knows the order of the rows, and
    its weights are positive and sum to 1: each output lies in the convex hull of the values.
    """
    x, w, order = normal(6, 4), normal(3, 4, 4), torch.randperm(6)
    out, weights = self_attention(x, *w)
    outcome = equal((self_attention(x[order], *w)[0], out[order]),
                    (weights.sum(dim=1), 1))
    return outcome._replace(holds=outcome.holds and bool((weights >= 0).all()))


@claim("layers", "detector-shapes")
def check_detector_shapes():
    """YOLO v1 gives S x S x (5 B + C) = 7 x 7 x 30; an RPN 2k scores and 4k offsets per place.

    Course: shapes not given. YOLO (Redmon et al. 2016): 448 pixels, S = 7 cells a side, B = 2 boxes
    of x, y, w, h and confidence, C = 20 classes. RPN (Ren et al. 2015): k = 3 scales x 3 shapes on
    VGG-16's last convolution. Counted by writing all boxes out; only the stride, 16, is computed.
    """
    cells = list(itertools.product(range(7), range(7)))
    numbers = [(cell, box, part) for cell in cells for box in range(2) for part in "xywhc"]
    numbers += [(cell, kind) for cell in cells for kind in range(20)]
    stride = receptive_field(VGG_16[:-1])[1]
    features = torch.zeros(1, 512, 608 // stride, 800 // stride)
    scores, offsets = nn.Conv2d(512, 2 * 9, 1)(features), nn.Conv2d(512, 4 * 9, 1)(features)
    anchors = len(list(itertools.product(range(608 // 16), range(800 // 16), range(3), range(3))))
    measured = [len(numbers), scores.numel() / anchors, offsets.numel() / anchors]
    return Outcome("7 x 7 x 30 = 1470; 2; 4", " ".join(f"{m:g}" for m in measured),
                   measured == [7 * 7 * 30, 2, 4])


# --- losses, activations -----------------------------------------------------------------------

@claim("losses", "bce-vs-l2")
def check_bce_vs_l2():
    """At p = 0.45 for label 1: squared error 0.3025, cross-entropy 0.7985.

    Course: yes (0.3; 0.798). The real reason to prefer cross-entropy is the gradient in the logit
    a, p = σ(a): 2 (p - 1) p (1 - p) against p - 1. Confidently wrong (a = -10), the first has
    vanished.
    """
    p = torch.tensor(0.45, dtype=torch.float64)
    values = ((p - 1) ** 2).item(), -p.log().item()
    wrong = torch.tensor(-10.0, dtype=torch.float64)
    slopes = [gradient(loss, wrong).item() for loss in (lambda a: (torch.sigmoid(a) - 1) ** 2,
                                                        lambda a: -F.logsigmoid(a))]
    return Outcome("0.3025, 0.7985", f"{values[0]:.4f}, {values[1]:.4f} "
                   f"(slopes at a = -10: {slopes[0]:.0e}, {slopes[1]:.4f})",
                   abs(values[0] - 0.3025) < 5e-5 and abs(values[1] - 0.7985) < 5e-5
                   and abs(slopes[0]) < 1e-4 and slopes[1] < -0.999)


@claim("losses", "sigmoid-tanh", holds=False)
def check_sigmoid_tanh():
    """Replacing sigmoid by tanh makes no difference to vanishing gradients.

    Course: "no significant difference". Both saturate, but max σ' = 1/4 and max tanh' = 1: over 20
    layers the best possible factor differs by 4^20.
    """
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)  # 0 is among them
    sigmoid, tanh = (gradient(lambda x: f(x).sum(), x).max().item()
                     for f in (torch.sigmoid, torch.tanh))
    return agree(1, (tanh / sigmoid) ** 20, "times as large")


def deep_gradient(activation, weights, x):
    """Size of ∂(sum of outputs)/∂x of a network of the layers weights [depth, width, width]."""
    def network(x):
        for w in weights:
            x = activation(w @ x)
        return x.sum()

    return gradient(network, x).norm().item()


@claim("losses", "relu-vanish", holds=False)
def check_relu_vanish():
    """A ReLU network cannot have vanishing gradients.

    Course: false, and it is: ReLU' = 1 does not help if the weights are small. 20 layers of width
    32 that start as in He et al. 2015, deviation √(2 / width), which keeps the gradient's size; all
    weights divided by 7 divide it by 7^20.
    """
    weights, x = (2 / 32) ** 0.5 * normal(20, 32, 32), normal(32)
    he, small = (deep_gradient(torch.relu, w, x) for w in (weights, weights / 7))
    return Outcome("about as before", f"weights / 7: {small / he:.0e} of it", small / he > 1e-3)


@claim("losses", "relu-linear", holds=False)
def check_relu_linear():
    """The gradient of ReLU is linear in its input where the input is positive.

    Course: false, and it is: ReLU is linear there, its gradient is the constant 1.
    """
    slopes = gradient(lambda x: torch.relu(x).sum(), torch.tensor([1.0, 2.0, 3.0])).tolist()
    return Outcome("1 : 2 : 3", " : ".join(f"{s:g}" for s in slopes), slopes[2] == 3 * slopes[0])


@claim("losses", "relu-dead")
def check_relu_dead():
    """ReLU units can die: zero output and zero gradient on all data.

    Course: true. One too long step of the bias is enough; no gradient ever brings the unit back.
    """
    x, w, b = normal(1000, 4), normal(4), torch.tensor(-50.0, dtype=torch.float64)
    output = torch.relu(x @ w + b)
    grads = gradient(lambda w, b: torch.relu(x @ w + b).sum(), w, b)
    return equal((output, 0), *((g, 0) for g in grads))


@claim("losses", "depth-numbers")
def check_depth_numbers():
    """Ten layers that each multiply by 0.5 or by 5: gradients 0.5^10 = 0.0009766, 5^10 = 9,765,625.

    Course: yes. Vanishing and exploding gradients in one line.
    """
    def chain(factor):
        return gradient(lambda x: math.prod([factor] * 10) * x, torch.tensor(1.0)).item()

    return Outcome("0.0009766, 9,765,625", f"{chain(0.5):.7f}, {chain(5.0):,.0f}",
                   chain(0.5) == 1 / 1024 and chain(5.0) == 9_765_625)


def dice_from_iou(iou):
    """Dice = 2 IoU / (1 + IoU): with I = |A ∩ B| and U = |A ∪ B|, |A| + |B| = U + I. In [0, 1]."""
    return 2 * iou / (1 + iou)


@claim("losses", "iou-dice")
def check_iou_dice():
    """Dice = 2 IoU / (1 + IoU), so Dice >= IoU, with equality at 0 and 1 alone.

    Course: in words. Both from counts of 1,000 pairs of random masks.
    """
    a, b = torch.rand(2, 1000, 30, dtype=torch.float64) < torch.rand(2, 1000, 1)
    both, either, sizes = (m.sum(dim=1).double() for m in (a & b, a | b, torch.cat([a, b], dim=1)))
    iou, dice = both / either.clamp(min=1), 2 * both / sizes.clamp(min=1)
    outcome = equal((dice, dice_from_iou(iou)))
    return outcome._replace(holds=outcome.holds and bool((dice >= iou).all()))


@claim("losses", "label-constraints")
def check_label_constraints():
    """An ImageNet label gives 999 * 2 = 1998 strict inequalities.

    Course: yes. Counted here: the label's score against each of the 999 others, read both ways,
    s_label > s_j and s_j < s_label: ordered pairs that hold the label. Only 999 of them are
    different statements, and they rank no two of the others.
    """
    label = torch.randint(1000, ()).item()
    ordered = [(i, j) for i, j in itertools.permutations(range(1000), 2) if label in (i, j)]
    outcome = agree(1998, len(ordered))
    return outcome._replace(measured=f"{len(ordered)} ({len(set(map(frozenset, ordered)))} differ)")


# --- optimisation ------------------------------------------------------------------------------

def mlp_loss(x, y, w1, b1, w2, b2, lam):
    """mean cross-entropy of relu(x W1ᵀ + b1) W2ᵀ + b2 and labels y, + λ/2 (‖W1‖² + ‖W2‖²). nats."""
    h = torch.relu(x @ w1.T + b1)
    return F.cross_entropy(h @ w2.T + b2, y) + lam / 2 * (w1.pow(2).sum() + w2.pow(2).sum())


def mlp_grads(x, y, w1, b1, w2, b2, lam):
    """Gradients of mlp_loss by hand: a dict of W1, b1, W2, b2, x, each shaped like its argument.

    x [B, d], y int64 [B] in 0..K-1, w1 [H, d], b1 [H], w2 [K, H], b2 [K].
    ∂a2 = (softmax(a2) - onehot(y)) / B,  ∂W2 = ∂a2ᵀ h + λ W2,  ∂b2 = Σ_B ∂a2,
    ∂a1 = (∂a2 W2) ⊙ [a1 > 0],  ∂W1 = ∂a1ᵀ x + λ W1,  ∂b1 = Σ_B ∂a1,  ∂x = ∂a1 W1.
    """
    a1 = x @ w1.T + b1
    h = a1.clamp(min=0)
    a2 = h @ w2.T + b2
    d_a2 = (a2.softmax(dim=1) - F.one_hot(y, len(b2))) / len(x)
    d_a1 = (d_a2 @ w2) * (a1 > 0)
    return {"W1": d_a1.T @ x + lam * w1, "b1": d_a1.sum(dim=0),
            "W2": d_a2.T @ h + lam * w2, "b2": d_a2.sum(dim=0), "x": d_a1 @ w1}


def random_mlp():
    """x, y, w1, b1, w2, b2 for the two checks below."""
    return (normal(6, 5), torch.randint(3, (6,)), normal(4, 5), normal(4), normal(3, 4), normal(3))


@claim("optimisation", "mlp-grads", holds=False)
def check_mlp_grads():
    """The regulariser λ/2 ‖W‖_F² has the gradient λ ‖W‖_F.

    Course: written so. It is λ W: a matrix, an entry for each weight, not one number. With the
    number in its place the gradient is off.
    """
    x, y, w1, b1, w2, b2 = random_mlp()
    right = gradient(lambda w: mlp_loss(x, y, w1, b1, w, b2, 0.1), w2)
    data_term = mlp_grads(x, y, w1, b1, w2, b2, lam=0)["W2"]
    as_written, as_matrix = ((right - data_term - r).abs().max().item()
                             for r in (0.1 * w2.norm(), 0.1 * w2))
    return Outcome("difference 0", f"{as_written:.2f} (with λ W: {as_matrix:.0e})",
                   as_written <= ROUNDING)


@claim("optimisation", "mlp-backprop")
def check_mlp_backprop():
    """The gradients of a two-layer network with cross-entropy and λ/2 ‖W‖², written out.

    mlp_grads has the formulas for W1, b1, W2, b2 and x, with λ W. Oracle: autograd.
    """
    x, y, *parameters = random_mlp()
    grads = gradient(lambda x, *p: mlp_loss(x, y, *p, 0.1), x, *parameters)
    by_hand = mlp_grads(x, y, *parameters, lam=0.1)
    return equal(*zip(grads, (by_hand[name] for name in ("x", "W1", "b1", "W2", "b2"))))


def numeric_grad(f, x, eps=6e-6):
    """Central differences: ∂f/∂x_i ≈ (f(x + eps e_i) - f(x - eps e_i)) / (2 eps), for all i.

    f: tensor like x -> scalar; x: float64, any shape. Two calls of f for each entry. The error is
    about eps² |f'''| / 6 + 2e-16 |f| / eps: smallest near eps = (2e-16)^(1/3) = 6e-6.
    """
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = eps
        grad.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad


def difference_errors(x, powers):
    """Mean error of forward and central differences of Σ exp(sin x), for each eps = 10^power."""
    def f(x):
        return x.sin().exp()

    exact, errors = x.cos() * f(x), []
    for eps in (10.0 ** p for p in powers):
        forward, central = (f(x + eps) - f(x)) / eps, (f(x + eps) - f(x - eps)) / (2 * eps)
        errors.append([(d - exact).abs().mean().item() for d in (forward, central)])
    return torch.tensor(errors)


@claim("optimisation", "numeric-grad")
def check_numeric_grad():
    """Central differences match autograd; the best eps is near 1e-8 forward, 6e-6 central.

    Course: yes. Cutting the Taylor series costs eps (forward) or eps² (central), rounding costs
    2e-16 / eps; the sum is smallest near (2e-16)^(1/2) or (2e-16)^(1/3). Error in eps: a U.
    """
    x = normal(50)
    by_autograd = gradient(lambda x: x.sin().exp().sum(), x)
    difference = (numeric_grad(lambda x: x.sin().exp().sum(), x) - by_autograd).abs().max().item()
    powers = [-12 + 0.25 * i for i in range(45)]
    best_forward, best_central = (powers[i] for i in difference_errors(x, powers).argmin(dim=0))
    return Outcome("1e-8, 6e-6", f"{10 ** best_forward:.0e}, {10 ** best_central:.0e} "
                   f"(difference {difference:.0e})",
                   difference < 1e-8 and abs(best_forward + 8) < 1.1
                   and abs(best_central + 5.2) < 1.1)


@claim("optimisation", "sgd-steps", holds=False)
def check_sgd_steps():
    """SGD makes one step per sample in every epoch.

    Course: true. With batches of B it makes ⌈N / B⌉: one per sample only for B = 1.
    """
    n, b = 1000, 64
    return agree(n, len(torch.arange(n).split(b)), "steps")


def batch_gradients(per_sample, b, replace):
    """The mean gradient of every possible batch of b, [number of batches, d]."""
    n = len(per_sample)
    chosen = (itertools.product(range(n), repeat=b) if replace
              else itertools.combinations(range(n), b))
    return torch.stack([per_sample[list(batch)].mean(dim=0) for batch in chosen])


@claim("optimisation", "sgd-unbiased")
def check_sgd_unbiased():
    """The mini-batch gradient is unbiased; its variance is σ²/B, times (N - B)/(N - 1) if drawn
    without replacement.

    Course: yes. All batches of B = 1, 2, 3 of N = 6 samples enumerated, both ways of drawing; σ² is
    the variance of the per-sample gradients of a least-squares loss.
    """
    x, y, w = normal(6, 3), normal(6), normal(3)
    per_sample = torch.stack([gradient(lambda w: (xi @ w - yi) ** 2, w) for xi, yi in zip(x, y)])
    full = gradient(lambda w: ((x @ w - y) ** 2).mean(), w)
    variance, pairs = per_sample.var(dim=0, correction=0), []
    for b, replace in itertools.product((1, 2, 3), (True, False)):
        batches = batch_gradients(per_sample, b, replace)
        pairs += [(batches.mean(dim=0), full),
                  (batches.var(dim=0, correction=0),
                   variance / b * (1 if replace else (6 - b) / 5))]
    return equal(*pairs)


@claim("optimisation", "sgd-below-gd", holds=False)
def check_sgd_below_gd():
    """The variance of SGD's gradient is below that of full gradient descent.

    Course: false, and it is. The full gradient has no sampling variance at all.
    """
    per_sample = normal(6, 3)
    sgd, gd = (batch_gradients(per_sample, b, replace=False).var(dim=0, correction=0).sum().item()
               for b in (2, 6))
    return Outcome("SGD < GD", f"{sgd:.3f} > {gd:.3f}", sgd < gd)


def steps_to(target, batch, rates, limit=2000):
    """Fewest SGD steps to loss <= target on least squares with noise, over all `rates`.

    y = x.w* + noise, x of 10 coordinates with variances 1 to 0.1, noise 0.5; the excess loss is the
    mean of 200 independent runs for each rate, all at once. A divergent rate never gets there.
    """
    variance = torch.logspace(0, -1, 10, dtype=torch.float64)
    error = torch.ones(len(rates), 200, 10, dtype=torch.float64)  # w - w*
    rates = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    for step in range(1, limit + 1):
        x = normal(200, batch, 10) * variance.sqrt()
        residual = torch.einsum("sbd,rsd->rsb", x, error) - 0.5 * normal(200, batch)
        error -= rates * torch.einsum("rsb,sbd->rsd", residual, x) / batch
        if ((error ** 2 * variance).sum(dim=2).mean(dim=1) / 2).min() <= target:
            return step
    return limit


@claim("optimisation", "batch-doubling")
def check_batch_doubling():
    """Twice the batch: fewer iterations to the same loss, about half as many while noise rules.

    Course: "decrease", right. Each batch has its own best rate. While noise is all there is,
    doubling about halves the steps; then curvature bounds the rate, and no batch beats full GD.
    """
    rates = [0.02 * 1.3 ** i for i in range(16)]
    a, b, c, d = (steps_to(0.01, batch, rates) for batch in (4, 8, 128, 256))
    return Outcome("fewer, ratio 0.5 -> 1", f"4, 8: {a}, {b} steps; 128, 256: {c}, {d}",
                   a > b > c >= d and 0.4 < b / a < 0.6 and d / c > 0.7)


@claim("optimisation", "gd-global", holds=False)
def check_gd_global():
    """Gradient descent reaches the global minimum, SGD a local one.

    Course: false, and it is. A double well, (x² - 1)² + 0.3 x: gradient descent from 1.5 ends in
    the well on the right; the lower one is on the left.
    """
    def f(x):
        return (x ** 2 - 1) ** 2 + 0.3 * x

    x = torch.tensor(1.5, dtype=torch.float64)
    for _ in range(300):
        x = x - 0.02 * gradient(f, x)
    lowest = f(torch.linspace(-2, 2, 40_001, dtype=torch.float64)).min().item()
    return agree(lowest, f(x).item(), "at its lowest", tolerance=1e-6)


@claim("optimisation", "newton-ravine", holds=False)
def check_newton_ravine():
    """Momentum beats Newton in a narrow ravine.

    Course: true. On a quadratic, however narrow, Newton needs one step. Heavy ball with its best
    rate and momentum (Polyak 1964) needs about √κ log(1/ε); here κ = 1000.
    """
    h = torch.tensor([1.0, 1000.0], dtype=torch.float64)  # f = Σ h x² / 2
    root = h.sqrt()
    momentum = ((root[1] - root[0]) / (root[1] + root[0])) ** 2
    rate = 4 / (root[1] + root[0]) ** 2
    x, v, steps = torch.ones(2, dtype=torch.float64), torch.zeros(2), 0
    start = x
    while x.norm() > 1e-6:
        v = momentum * v - rate * h * x
        x, steps = x + v, steps + 1
    after_newton = (start - torch.linalg.solve(torch.diag(h), h * start)).norm().item()
    return Outcome("momentum in fewer steps", f"momentum {steps}, Newton 1 "
                   f"(error {after_newton:g})", after_newton > 1e-6)


def ridge(x, y, lam):
    """argmin_w ‖x w - y‖² + λ ‖w‖² = (xᵀx + λ)⁻¹ xᵀy."""
    return torch.linalg.solve(x.T @ x + lam * torch.eye(x.shape[1]).to(x), x.T @ y)


@claim("optimisation", "bilevel", holds=False)
def check_bilevel():
    """The inner problem of a bilevel problem must be solved by gradient descent.

    Course: asked, not answered. λ of ridge regression by its loss on held-out data: the inner
    optimum is in closed form and implicit differentiation of xᵀ(x w - y) + λ w = 0 gives
    dw/dλ = -(xᵀx + λ)⁻¹ w, so the outer gradient is exact. Oracle: central differences.
    """
    x, y, held_x, held_y = normal(20, 4), normal(20), normal(10, 4), normal(10)
    lam = torch.tensor(0.7, dtype=torch.float64)
    w = ridge(x, y, lam)
    dw = -torch.linalg.solve(x.T @ x + lam * torch.eye(4).to(x), w)
    exact = 2 * (held_x @ w - held_y) @ (held_x @ dw)
    measured = numeric_grad(lambda lam: ((held_x @ ridge(x, y, lam) - held_y) ** 2).sum(), lam)
    error = abs((exact - measured) / exact).item()
    return Outcome("no exact gradient else", f"exact: relative error {error:.0e}", error > 1e-5)


def rnn(inputs, w_x, w_h, truncate=None):
    """States h_t = tanh(W_x x_t + W_h h_{t-1}), t = 1..T, inputs [T, d].

    truncate = S: the gradient of the last state flows through the last S steps alone.
    """
    h = torch.zeros(len(w_h)).to(inputs)
    for t, x in enumerate(inputs):
        if truncate is not None and t == len(inputs) - truncate:
            h = h.detach()
        h = torch.tanh(w_x @ x + w_h @ h)
    return h


@claim("optimisation", "tbptt")
def check_tbptt():
    """Truncating backpropagation through time at S steps cuts the gradient, and only the gradient.

    Course: three statements, answered false, false, true. The states stay the same; the gradient
    of the last state for inputs more than S steps back is exactly zero, for the others unchanged.
    """
    x, w_x, w_h, s = normal(12, 3), normal(4, 3), normal(4, 4) / 2, 5
    full, cut = (gradient(lambda x: rnn(x, w_x, w_h, truncate).sum(), x) for truncate in (None, s))
    return equal((rnn(x, w_x, w_h), rnn(x, w_x, w_h, s)), (cut[-s:], full[-s:]),
                 (cut[:-s], 0))


@claim("optimisation", "tbptt-reach", holds=False)
def check_tbptt_reach():
    """With truncation at S steps the network can only use relations at most S steps apart.

    It holds for the gradient, not for the state: the last state still moves with the first input,
    12 steps back, with S = 5.
    """
    x, w_x, w_h = normal(12, 3), normal(4, 3), normal(4, 4) / 2
    other = x.clone()
    other[0] += 1
    moved = (rnn(other, w_x, w_h, 5) - rnn(x, w_x, w_h, 5)).norm().item()
    return Outcome("state moves by 0", f"by {moved:.0e}", moved == 0)


def moments(z):
    """Mean, variance and kurtosis (3 for a normal) of each column of z [B, d]: three [d]."""
    centred = z - z.mean(dim=0)
    variance = centred.pow(2).mean(dim=0)
    return z.mean(dim=0), variance, centred.pow(4).mean(dim=0) / variance ** 2


def moment_training(optimiser, rate, zeroed, steps):
    """Losses of a linear map trained to codes with moments (0, 1, 3), gradients zeroed or not."""
    x, w, b = 2 * torch.rand(256, 8), torch.randn(8, 4) / 8 ** 0.5, torch.zeros(4)
    w, b = (p.double().requires_grad_() for p in (w, b))
    opt, losses = optimiser([w, b], lr=rate), []
    for _ in range(steps):
        mean, variance, kurtosis = moments(x.double() @ w + b)
        loss = (mean ** 2 + (variance - 1) ** 2 + (kurtosis - 3) ** 2).mean() / 3
        if zeroed:
            opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@claim("optimisation", "grad-accumulate")
def check_grad_accumulate():
    """With Adam, not zeroing the gradients makes the loss grow without bound.

    Course: observed on the moment loss (chapter 06). Each step uses the sum of all gradients so
    far; Adam rescales it to full steps, however large the sum already is. "Grows" is measured as:
    still climbing after 300 steps, to over 5 times the start, while the zeroed run is under 0.1.
    """
    state = torch.get_rng_state()
    zeroed = moment_training(torch.optim.Adam, 0.01, True, 300)
    torch.set_rng_state(state)  # the same data and start
    summed = moment_training(torch.optim.Adam, 0.01, False, 300)
    early, late = max(summed[:150]), max(summed[150:])
    return Outcome("grows", f"{summed[0]:.2g}, {early:.2g}, {late:.2g} (zeroed: {zeroed[-1]:.0e})",
                   late > early > summed[0] and late > 5 * summed[0] and zeroed[-1] < 0.1)


@claim("optimisation", "grad-accumulate-sgd", holds=False)
def check_grad_accumulate_sgd():
    """With plain gradient descent, too, not zeroing gradients makes the loss grow without bound.

    The sum of all gradients is momentum 1: v += g, x -= η v swings for ever, like a ball without
    friction, and keeps its energy. It neither settles nor grows (rate 0.5, 1,000 steps).
    """
    losses = moment_training(torch.optim.SGD, 0.5, False, 1000)
    early, late = max(losses[:300]), max(losses[700:])
    return Outcome("grows", f"{losses[0]:.2g}, {early:.2g}, {late:.2g}: swings", late > 2 * early)


@claim("optimisation", "grad-norm-noise")
def check_grad_norm_noise():
    """Noise of variance s² on D's input is a gradient penalty, to second order in s.

    Course: "I read". E L(D(x + e)) - L(D(x)) = s²/2 tr ∇²L(D(x)) + O(s⁴) (Bishop 1995); for squared
    error at a perfect fit the trace is 2 ‖∇D‖². The rest must fall by 16 when s halves, for that
    loss and for softplus(-D). The mean over e takes {-√3, 0, √3} with 1/6, 2/3, 1/6 in each
    coordinate: exact to fifth order.
    """
    w, v = normal(5, 2), normal(5)
    x = normal(2)

    def D(x):
        return torch.tanh(x @ w.T) @ v

    at_x = D(x)
    squared, softplus = (lambda x: (D(x) - at_x) ** 2), (lambda x: F.softplus(-D(x)))
    points = torch.tensor(list(itertools.product(THREE_POINTS, repeat=2)), dtype=torch.float64)
    weights = torch.tensor(THREE_WEIGHTS, dtype=torch.float64)
    weights = (weights[:, None] * weights).flatten()
    traces = [2 * gradient(D, x).pow(2).sum(),
              torch.autograd.functional.hessian(softplus, x).trace()]
    ratios = []
    for loss, trace in zip((squared, softplus), traces):
        rest = [(weights @ loss(x + s * points) - loss(x) - s ** 2 / 2 * trace).item()
                for s in (0.02, 0.01)]
        ratios.append(rest[0] / rest[1])
    return agree(16, max(ratios, key=lambda ratio: abs(ratio - 16)), "times less", tolerance=0.05)


# --- flows and autoencoders --------------------------------------------------------------------

def coupling_log_prob(x, layers):
    """log p(x) = log N(z; 0, I) + log |det ∂z/∂x|, z = M⁻¹(x), in nats, for x [B, d]: [B].

    layers of M from z to x: (mask, scale, shift), mask a 0/1 tensor [d], scale and shift functions
    [B, d] -> [B, d] of the coordinates that the mask b keeps (Dinh et al. 2017, section 3):
    M: x = b z + (1 - b)(z exp(scale(b z)) + shift(b z)); log |det ∂z/∂x| = -Σ (1 - b) scale(b x).
    """
    log_det = 0
    for mask, scale, shift in reversed(layers):
        kept = mask * x
        s = (1 - mask) * scale(kept)
        x = kept + (1 - mask) * (x - shift(kept)) * (-s).exp()
        log_det = log_det - s.sum(dim=1)
    return log_det - (x ** 2).sum(dim=1) / 2 - x.shape[1] / 2 * math.log(2 * math.pi)


def random_coupling(d, depth):
    """Coupling layers with one-layer tanh nets; the mask keeps even and odd coordinates in turn."""
    def net():
        w, b = normal(d, d) / d ** 0.5, 0.5 * normal(d)
        return lambda x: torch.tanh(x @ w.T + b) / 2

    even = (torch.arange(d) % 2 == 0).double()
    return [(even if i % 2 else 1 - even, net(), net()) for i in range(depth)]


@claim("flows and autoencoders", "change-of-variables")
def check_change_of_variables():
    """log p(x) = log p_z(M⁻¹(x)) + log |det ∂M⁻¹/∂x| for a stack of invertible maps.

    Course: yes. Four affine coupling layers in the plane. Each Jacobian is triangular, so the log
    determinant is a sum: that it is right shows in autograd's Jacobian of M at three points, and
    in the density's integral over the plane, 1.
    """
    layers = random_coupling(2, 4)

    def M(z):
        for mask, scale, shift in layers:
            z = mask * z + (1 - mask) * (z * scale(mask * z).exp() + shift(mask * z))
        return z

    z = normal(3, 2)
    jacobians = torch.stack([torch.autograd.functional.jacobian(M, one) for one in z])
    by_autograd = -(z ** 2).sum(dim=1) / 2 - math.log(2 * math.pi) - jacobians.det().abs().log()
    apart = equal((coupling_log_prob(M(z), layers), by_autograd))
    line = torch.linspace(-20, 20, 401, dtype=torch.float64)
    p = coupling_log_prob(torch.cartesian_prod(line, line), layers).exp()
    whole = agree(1, p.sum().item() * (line[1] - line[0]).item() ** 2, "in all", tolerance=1e-6)
    return whole._replace(holds=whole.holds and apart.holds)


@claim("flows and autoencoders", "glo-no-prior")
def check_glo_no_prior():
    """In GLO, where each picture has its own learned code, G(z) of a normal z is no sample.

    Course: yes. Nothing ties the codes to a law (Bojanowski et al. 2018 fit a Gaussian to them
    afterwards). 512 points on a ring of 8 modes, codes in the plane that start normal, 400 steps:
    share of points within 3 standard deviations of a mode.
    """
    centres = common.ring()
    x = common.gaussian_mixture(centres, 0.05, 512)
    G = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    codes = torch.randn(512, 2, requires_grad=True)
    opt = torch.optim.Adam([{"params": [codes], "lr": 1e-2},
                            {"params": G.parameters(), "lr": 3e-3}])
    for _ in range(400):
        loss = (G(codes) - x).pow(2).sum(dim=1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    own, drawn = ((torch.cdist(G(z), centres).min(dim=1).values < 0.15).float().mean().item()
                  for z in (codes, torch.randn(4000, 2)))
    return Outcome("far apart", f"learned codes {own:.0%}, normal z {drawn:.0%}",
                   own > 0.8 and drawn < 0.3)


def kl_standard_normal(mu, sigma):
    """KL(N(mu, Σ) ‖ N(0, I)) = (tr Σ + ‖mu‖² - d - log det Σ) / 2, nats; mu [d], sigma [d, d]."""
    return (sigma.trace() + mu @ mu - len(mu) - torch.logdet(sigma)) / 2


def log_normal(x, mu, sigma):
    """log N(x; mu, Σ), nats; x, mu [d], sigma [d, d]."""
    d = x - mu
    return -(d @ torch.linalg.solve(sigma, d) + torch.logdet(2 * math.pi * sigma)) / 2


def random_covariance(d):
    """A random symmetric matrix with eigenvalues of 0.1 and more."""
    a = normal(d, d)
    return a @ a.T / d + 0.1 * torch.eye(d).to(a)


def linear_vae():
    """p(z) = N(0, I), p(x given z) = N(w z, v I): returns x, w, v and the exact posterior of z.

    Σ = (I + wᵀw / v)⁻¹, mu = Σ wᵀx / v.
    """
    w, v = normal(5, 2), 0.3
    x = w @ normal(2) + v ** 0.5 * normal(5)
    sigma = torch.linalg.inv(torch.eye(2).to(w) + w.T @ w / v)
    return x, w, v, sigma @ w.T @ x / v, sigma


def linear_elbo(x, w, v, mu, sigma):
    """E_q log p(x given z) - KL(q ‖ p(z)), q = N(mu, Σ), of the linear VAE; closed form, nats."""
    fit = ((x - w @ mu) ** 2).sum() + (w @ sigma @ w.T).trace()
    return -(fit / v + len(x) * math.log(2 * math.pi * v)) / 2 - kl_standard_normal(mu, sigma)


@claim("flows and autoencoders", "vae-elbo")
def check_vae_elbo():
    """A VAE minimises an upper bound of -log p(x), which is reached at the true posterior.

    Course: true, in words. log p(x) - ELBO = KL(q ‖ p(z given x)) >= 0 (Kingma, Welling 2014,
    eqs. 1 to 3). In a linear-Gaussian VAE all is exact: p(x) = N(0, wwᵀ + v I). 100 random q's.
    """
    x, w, v, mu, sigma = linear_vae()
    log_p = log_normal(x, torch.zeros_like(x), w @ w.T + v * torch.eye(5).to(w))
    at_posterior = (log_p - linear_elbo(x, w, v, mu, sigma)).item()
    gaps = [(log_p - linear_elbo(x, w, v, mu + normal(2), random_covariance(2))).item()
            for _ in range(100)]
    return Outcome("gap > 0; 0 at posterior", f"{min(gaps):.2f} to {max(gaps):.0f}; "
                   f"{at_posterior:.0e}", min(gaps) > 0 and abs(at_posterior) < ROUNDING)


@claim("flows and autoencoders", "vae-posterior", holds=False)
def check_vae_posterior():
    """q(z given x) is N(0, I), and encoding a picture twice gives the same picture.

    Course: asked, not answered. Both are wrong. N(0, I) is the prior: what z is before x is seen
    (the average of q over the data comes near it). And z is drawn: twice the same x, two z, two
    pictures. The exact posterior of a linear-Gaussian VAE.
    """
    x, w, v, mu, sigma = linear_vae()
    root = torch.linalg.cholesky(sigma)
    pictures = [w @ (mu + root @ normal(2)) for _ in range(2)]
    kl, apart = kl_standard_normal(mu, sigma).item(), (pictures[0] - pictures[1]).norm().item()
    return Outcome("KL 0, pictures 0 apart", f"KL {kl:.2f} nats, {apart:.2f} apart",
                   kl < ROUNDING or apart < ROUNDING)


@claim("flows and autoencoders", "kl-closed-form")
def check_kl_closed_form():
    """KL(N(mu, Σ) ‖ N(0, I)) = (tr Σ + ‖mu‖² - d - log det Σ) / 2.

    Course: yes; its loss carries no 1/2, so twice the KL. Other side: the mean of log q - log p
    over the points mu ± √d (column of Σ^½), which is exact because both logs are quadratic.
    """
    mu, sigma = normal(3), random_covariance(3)
    columns = 3 ** 0.5 * torch.linalg.cholesky(sigma).T
    zero, one = torch.zeros_like(mu), torch.eye(3).to(mu)
    mean = sum(log_normal(z, mu, sigma) - log_normal(z, zero, one)
               for z in torch.cat([mu + columns, mu - columns])) / 6
    return agree(mean.item(), kl_standard_normal(mu, sigma).item(), "nats")


# --- GANs --------------------------------------------------------------------------------------

def jensen_shannon(p, q):
    """JSD = KL(p ‖ m)/2 + KL(q ‖ m)/2, m = (p + q)/2; nats, 0 to log 2; p, q [n] sum to 1."""
    m = (p + q) / 2
    return (torch.special.xlogy(p, p) + torch.special.xlogy(q, q)
            - torch.special.xlogy(2 * m, m)).sum() / 2


def gan_value(D, p, q):
    """V(D) = E_p log D + E_q log(1 - D), D, p, q [n] (Goodfellow et al. 2014, eq. 1); nats."""
    return (p * D.log() + q * (1 - D).log()).sum()


@claim("GANs", "optimal-d")
def check_optimal_d():
    """D* = p / (p + q) maximises V, and V(D*) = 2 JSD(p, q) - log 4.

    Goodfellow et al. 2014, prop. 1 and thm. 1. V is concave in D: its gradient vanishes at D*, and
    100 other D's do worse.
    """
    p, q = normal(6).softmax(0), normal(6).softmax(0)
    best = p / (p + q)
    value = gan_value(best, p, q)
    others = torch.stack([gan_value(torch.rand(6, dtype=torch.float64), p, q) for _ in range(100)])
    outcome = equal((value, 2 * jensen_shannon(p, q) - math.log(4)),
                    (gradient(lambda D: gan_value(D, p, q), best), 0))
    return outcome._replace(holds=outcome.holds and bool((others < value).all()))


@claim("GANs", "perfect-d", holds=False)
def check_perfect_d():
    """At p = q, with a perfect D, more training still improves G.

    Goodfellow et al. 2014, prop. 1. D* is 1/2 everywhere, so V does not depend on G's law to first
    order: the gradient for the logits of q is zero. For p ≠ q it is not.
    """
    logits, other = normal(6), normal(6)

    def grad_g(p):
        D = p / (p + logits.softmax(0))
        return gradient(lambda a: gan_value(D, p, a.softmax(0)), logits).norm().item()

    at_equilibrium, before = grad_g(logits.softmax(0)), grad_g(other.softmax(0))
    return Outcome("gradient for G", f"{at_equilibrium:.0e} (p ≠ q: {before:.2f})",
                   at_equilibrium > ROUNDING)


@claim("GANs", "detach-d", holds=False)
def check_detach_d():
    """Training D needs backpropagation into G.

    Course: asked, not answered. D's gradient is the same with G(z).detach(), to the last bit; the
    pass through G is only wasted time.
    """
    G, D = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
    z = normal(8, 3)

    def grad_d(x_fake):
        return torch.autograd.grad(F.softplus(D(x_fake)).mean(), D.weight)[0]

    difference = (grad_d(G(z)) - grad_d(G(z).detach())).abs().max().item()
    return Outcome("another gradient", f"difference {difference:g}", difference > 0)


def generator_slopes(a):
    """d loss_G / d a at D's logit a of a fake: minimax log(1 - σ(a)), non-saturating -log σ(a)."""
    minimax = gradient(lambda a: F.logsigmoid(-a).sum(), a)
    nonsaturating = gradient(lambda a: -F.logsigmoid(a).sum(), a)
    return minimax, nonsaturating


@claim("GANs", "saturation-low")
def check_saturation_low():
    """As D(G(z)) -> 0 the minimax generator's gradient vanishes, the non-saturating one does not.

    Course: yes. In the logit a: -σ(a) against -(1 - σ(a)). At a = -20, D(G(z)) = 2e-9.
    """
    a = torch.tensor(-20.0, dtype=torch.float64)
    minimax, nonsaturating = (slope.item() for slope in generator_slopes(a))
    sigma = 1 / (1 + math.exp(20))
    return Outcome(f"{-sigma:.0e}, {-(1 - sigma):.4f}", f"{minimax:.0e}, {nonsaturating:.4f}",
                   abs(minimax + sigma) < 1e-15 and abs(nonsaturating + 1 - sigma) < ROUNDING)


@claim("GANs", "saturation-high", holds=False)
def check_saturation_high():
    """As D(G(z)) -> 1 the minimax generator's gradient explodes to -∞.

    Course: -∞. With respect to D's output D, -1/(1 - D) does. But G is reached through the logit a,
    where it is -σ(a) -> -1: the sigmoid's slope D (1 - D) takes the factor away.
    """
    a = torch.tensor(20.0, dtype=torch.float64)
    in_logit = generator_slopes(a)[0].item()
    in_output = gradient(lambda D: (1 - D).log(), torch.sigmoid(a)).item()
    return Outcome("-∞", f"{in_logit:.4f} in the logit ({in_output:.0e} in D)", in_logit < -1e3)


def binary_entropy(p):
    """H(p) = -p log p - (1 - p) log(1 - p), nats."""
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@claim("GANs", "smoothing-floor")
def check_smoothing_floor():
    """With real label 0.9 D's loss cannot fall under H(0.9) = 0.3251.

    Course: "an asymptotic bound"; its log shows 0.3253. Cross-entropy of a label y is H(y) +
    KL(y ‖ D), smallest at D = y. The lowest loss over 100,000 logits.
    """
    a = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    lowest = F.binary_cross_entropy_with_logits(a, torch.full_like(a, 0.9), reduction="none").min()
    return agree(binary_entropy(0.9), lowest.item(), "nats", tolerance=1e-8)


@claim("GANs", "double-sigmoid")
def check_double_sigmoid():
    """A log frozen at Loss_D 1.0064, Loss_G 0.6931 is a sigmoid applied twice, and D saturated.

    Course: has this log; "I do not understand why the losses are constant". D ends in a sigmoid and
    the loss applies another: "logits" are 1 on reals, 0 on fakes. Loss_D = softplus(-1) + log 2,
    Loss_G = log 2, and the first sigmoid lets no gradient through.
    """
    real, fake = torch.tensor([40.0, -40.0], dtype=torch.float64).sigmoid()
    loss_d = F.softplus(-real) + F.softplus(fake)
    loss_g = F.softplus(-fake)
    slope = gradient(lambda a: F.softplus(-torch.sigmoid(a)),
                     torch.tensor(-40.0, dtype=torch.float64))
    return Outcome("1.0064, 0.6931", f"{loss_d:.4f}, {loss_g:.4f} (G's slope {slope:.0e})",
                   abs(loss_d.item() - math.log(1 + math.exp(-1)) - math.log(2)) < ROUNDING
                   and f"{loss_d:.4f} {loss_g:.4f}" == "1.0064 0.6931" and abs(slope) < 1e-12)


@claim("GANs", "minimax-maximin", holds=False)
def check_minimax_maximin():
    """min_G max_D V = max_D min_G V: the order of the players does not matter.

    Course: "equivalent". In matching pennies -1 < 1 for pure strategies; only mixed ones have equal
    values, 0 and 0 (von Neumann 1928). GAN training moves one pair of pure strategies.
    """
    pennies = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # rows minimise, columns maximise
    max_min, min_max = pennies.amin(0).max().item(), pennies.amax(1).min().item()
    share = torch.linspace(0, 1, 101)
    mixed = torch.stack([share, 1 - share], dim=1) @ pennies @ torch.stack([share, 1 - share])
    mixed_values = mixed.amin(0).max().item(), mixed.amax(1).min().item()
    return Outcome("equal", f"{max_min:g} and {min_max:g} (mixed: {mixed_values[0]:g} and "
                   f"{mixed_values[1]:g})",
                   not (max_min < min_max and mixed_values[0] == mixed_values[1]))


@claim("GANs", "minimax-bound")
def check_minimax_bound():
    """max_D min_G V <= min_G max_D V.

    The general half of the claim above: who moves second knows more. 1,000 random games.
    """
    games = normal(1000, 4, 5)
    ordered = (games.amin(1).amax(1) <= games.amax(2).amin(1)).sum().item()
    return agree(1000, ordered, "of 1000 games")


def bilinear_step(x, y, eta, k=0, exact=True, alternating=False):
    """One step of the game V = x y, x descends and y ascends with rate eta, by autograd.

    x sees y after k ascent steps; exact: and how those depend on x; otherwise as constants
    ("rollback"). Simultaneous: y's own step uses the old x; alternating: the new one.
    """
    x = x.detach().requires_grad_()
    y_k = y
    for _ in range(k):
        y_k = y_k + eta * (x if exact else x.detach())  # ∂V/∂y = x
    x_new = x - eta * torch.autograd.grad(x * y_k, x)[0]
    return x_new.detach(), y + eta * (x_new if alternating else x).detach()


def bilinear_growth(eta, k=0, exact=True, alternating=False):
    """That step is a linear map of (x, y): the largest modulus of its eigenvalues.

    In the long run the distance to the solution (0, 0) grows by it in every step.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    columns = [torch.stack(bilinear_step(x, y, eta, k, exact, alternating))
               for x, y in ((one, zero), (zero, one))]
    return torch.linalg.eigvals(torch.stack(columns, dim=1)).abs().max().item()


@claim("GANs", "bilinear-game")
def check_bilinear_game():
    """On V = x y, rollback unrolling works from k = 2, exact unrolling from k = 1, plain GAN never.

    Course: found by experiment that (rollback) unrolling works from k >= 2. One simultaneous step
    turns and has the determinant 1 + η², exact 1 - (2k - 1) η², rollback 1 - (k - 1) η² (kη < 1):
    the distance to (0, 0) is multiplied by its root, which is 1 for rollback with k = 1, and for
    alternating plain steps.
    """
    eta = 0.1
    pairs = [(1 + eta ** 2, bilinear_growth(eta)), (1, bilinear_growth(eta, alternating=True))]
    for k in range(1, 6):
        pairs += [(1 - (2 * k - 1) * eta ** 2, bilinear_growth(eta, k)),
                  (1 - (k - 1) * eta ** 2, bilinear_growth(eta, k, exact=False))]
    first = [k for k in range(6) if bilinear_growth(eta, k, exact=False) < 1 - ROUNDING][0]
    holds = first == 2 and all(abs(det ** 0.5 - growth) < ROUNDING for det, growth in pairs)
    return Outcome("rollback from k = 2", f"from k = {first}; plain {pairs[0][1]:.4g}, exact k = 1 "
                   f"{pairs[2][1]:.4g}", holds)


def wasserstein_1d(x, y):
    """W1 of two samples of equal size on the line: mean |x_(i) - y_(i)| of the sorted values."""
    return (x.sort().values - y.sort().values).abs().mean()


@claim("GANs", "js-vs-w1")
def check_js_vs_w1():
    """Two parallel lines at distance d: JSD = log 2 for every d ≠ 0, W1 = d.

    Arjovsky et al. 2017, example 1: why WGAN has a gradient where GAN has none. Across the lines
    the laws are two points on a grid of cells; along them they agree.
    """
    cells = torch.eye(21, dtype=torch.float64)
    pairs = []
    for d in range(1, 21):
        pairs += [(jensen_shannon(cells[0], cells[d]), math.log(2)),
                  (wasserstein_1d(torch.zeros(100), torch.full((100,), d)), d)]
    return equal((jensen_shannon(cells[0], cells[0]), 0), *pairs)


def gradient_penalty(critic, x):
    """mean (‖∇_x critic(x)‖ - 1)², x [B, d] (Gulrajani et al. 2017, eq. 3)."""
    return ((gradient(lambda x: critic(x).sum(), x).norm(dim=1) - 1) ** 2).mean()


@claim("GANs", "gp-linear")
def check_gp_linear():
    """A linear critic f(x) = w.x has the gradient penalty (‖w‖ - 1)²; a zero critic has 1.

    Its gradient is w everywhere. A penalty of 0 for a critic that does nothing has lost its -1.
    """
    x, w = normal(16, 5), normal(5)
    return equal((gradient_penalty(lambda x: x @ w, x), (w.norm() - 1) ** 2),
                 (gradient_penalty(lambda x: 0 * x, x), 1))


def power_iteration(w, n_iter, u):
    """σ = uᵀ W v after n_iter rounds of v <- Wᵀu / ‖‖, u <- W v / ‖‖ (Miyato 2018, alg. 1)."""
    for _ in range(n_iter):
        v = F.normalize(w.T @ u, dim=0)
        u = F.normalize(w @ v, dim=0)
    return u @ w @ v


@claim("GANs", "spectral")
def check_spectral():
    """Power iteration converges to the largest singular value from below.

    uᵀ W v of unit vectors never exceeds it, and each round can only raise it. Oracle: the SVD.
    """
    w, u = normal(8, 5), F.normalize(normal(8), dim=0)
    largest = torch.linalg.svdvals(w)[0].item()
    sigmas = torch.stack([power_iteration(w, n, u) for n in (1, 2, 4, 8, 2000)])
    rises = bool((sigmas.diff() > -ROUNDING).all()) and sigmas.max() <= largest + ROUNDING
    outcome = agree(largest, sigmas[-1].item(), tolerance=1e-6)
    return outcome._replace(holds=outcome.holds and bool(rises))


# --- samples and scores ------------------------------------------------------------------------

def mmd_imq(x, weights_x, y, weights_y):
    """MMD² of two weighted point sets on the line, kernel 1 / (1 + (a - b)²); 0 for equal laws."""
    def mean(a, weights_a, b, weights_b):
        return weights_a @ (1 / (1 + (a[:, None] - b) ** 2)) @ weights_b

    return (mean(x, weights_x, x, weights_x) + mean(y, weights_y, y, weights_y)
            - 2 * mean(x, weights_x, y, weights_y))


def normal_points(n):
    """n equally weighted points with the law N(0, 1) in the limit: quantiles (i + 1/2) / n."""
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(middle), torch.full((n,), 1 / n, dtype=torch.float64)


@claim("samples and scores", "moments-not-gaussian", holds=False)
def check_moments_not_gaussian():
    """Mean 0, variance 1 and kurtosis 3 make a Gaussian.

    Course: used so, as the loss of its WAE (chapter 06). {-√3, 0, √3} with weights 1/6, 2/3, 1/6
    has all three, and the fifth moment too; an MMD tells it from N(0, 1).
    """
    law = torch.tensor([THREE_POINTS, THREE_WEIGHTS], dtype=torch.float64)
    x = law[0].repeat_interleave((600 * law[1]).round().long())
    mean, variance, kurtosis = (m.item() for m in moments(x[:, None]))
    same_moments = max(abs(mean), abs(variance - 1), abs(kurtosis - 3)) < ROUNDING
    apart = mmd_imq(*law, *normal_points(2000)).item()
    same = mmd_imq(*normal_points(1999), *normal_points(2000)).item()
    return Outcome("MMD² 0", f"moments {abs(mean):.0f}, {variance:.4g}, {kurtosis:.4g}; MMD² "
                   f"{apart:.2g} (normal: {abs(same):.0e})",
                   not (same_moments and apart > 100 * abs(same)))


def inception_score(probs):
    """IS = exp(mean_x KL(p(y given x) ‖ p(y))), p(y) the mean; probs [N, K], rows sum to 1."""
    p_y = probs.mean(dim=0)
    kl = (torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, p_y)).sum(dim=1)
    return kl.mean().exp()


@claim("samples and scores", "inception-bounds")
def check_inception_bounds():
    """1 <= IS <= K, the number of classes, with both reached.

    Salimans et al. 2016. log IS is the mutual information of picture and class: 0 if all rows are
    equal, log K if each row is sure and all classes are equally frequent.
    """
    k = 10
    lowest = inception_score(normal(k).softmax(0).expand(50, k)).item()
    highest = inception_score(torch.eye(k, dtype=torch.float64).repeat(5, 1)).item()
    between = [inception_score((3 * normal(50, k)).softmax(1)).item() for _ in range(100)]
    return Outcome("1 <= IS <= 10", f"{lowest:.4g}, {min(between):.3g} to {max(between):.3g}, "
                   f"{highest:.4g}", abs(lowest - 1) < ROUNDING and abs(highest - k) < ROUNDING
                   and 1 < min(between) and max(between) < k)


def frechet_distance(mu_a, cov_a, mu_b, cov_b):
    """‖mu_a - mu_b‖² + tr(A + B - 2 (A^½ B A^½)^½): squared W2 of Gaussians, mu [d], cov [d, d].

    Dowson, Landau 1982; Heusel et al. 2017 take it over Inception features and call it FID.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mu_a - mu_b).pow(2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross


@claim("samples and scores", "fid-gaussians")
def check_fid_gaussians():
    """The FID of two Gaussians is in closed form: 0 for equal ones; Σ (√a - √b)² if they commute.

    Course: in words. Covariances with the same eigenvectors, a common rotation of diagonals.
    """
    turn = torch.linalg.qr(normal(4, 4))[0]
    a, b, shift = torch.rand(4).double(), torch.rand(4).double(), normal(4)
    cov_a, cov_b = turn * a @ turn.T, turn * b @ turn.T
    expected = shift.pow(2).sum() + (a.sqrt() - b.sqrt()).pow(2).sum()
    return equal((frechet_distance(shift, cov_a, 0 * shift, cov_b), expected),
                 (frechet_distance(shift, cov_a, shift, cov_a), 0))


def truncated_normal_variance(limit):
    """Variance of N(0, 1) given |z| <= limit: 1 - 2 t φ(t) / (2 Φ(t) - 1), t = limit > 0."""
    density = math.exp(-limit ** 2 / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * limit * density / math.erf(limit / math.sqrt(2))


@claim("samples and scores", "truncation")
def check_truncation():
    """Truncating z lowers its variance, the more so the lower the threshold.

    Course: yes, with quality up and diversity down (Brock et al. 2019): whether the pictures get
    better is another matter, and those of chapter 07 do not. Thresholds 0.5, 1, 2: the variance in
    closed form against a sum over the density.
    """
    pairs = []
    for limit in (0.5, 1.0, 2.0):
        z = limit * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        density = (-z ** 2 / 2).exp()
        pairs.append((truncated_normal_variance(limit), (density @ z ** 2 / density.sum()).item()))
    expected, measured = (", ".join(f"{v:.4f}" for v in side) for side in zip(*pairs))
    return Outcome(expected, measured, all(abs(a - b) < ROUNDING for a, b in pairs)
                   and pairs[0][0] < pairs[1][0] < pairs[2][0] < 1)


def merge_batch_statistics(counts, means, variances):
    """Mean and (population) variance [C] of the joined batch from those of its R parts.

    counts [R], means and variances [R, C]. mean = Σ n_r m_r / n; variance = Σ n_r (v_r + (m_r -
    mean)²) / n: the spread inside the parts and that between them (Chan et al. 1979).
    """
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(dim=0)


@claim("samples and scores", "cross-replica-bn")
def check_cross_replica_bn():
    """Batch norm with statistics merged over all devices is batch norm of the joined batch.

    Course: yes. Normalising on each device by itself is something else: it hides how the parts
    differ. Parts of 8, 8 and 4 samples.
    """
    x = normal(20, 3) + torch.arange(20)[:, None] // 8
    parts = x.split(8)
    mean, variance = merge_batch_statistics(
        torch.tensor([8, 8, 4]).double(), torch.stack([p.mean(0) for p in parts]),
        torch.stack([p.var(0, correction=0) for p in parts]))
    joined = F.batch_norm(x, None, None, training=True)
    alone = torch.cat([F.batch_norm(part, None, None, training=True) for part in parts])
    outcome = equal(((x - mean) / (variance + 1e-5).sqrt(), joined))  # 1e-5: torch's default
    apart = (alone - joined).abs().max().item()
    return outcome._replace(measured=f"{outcome.measured} (each alone: {apart:.2f})",
                            holds=outcome.holds and apart > 0.1)


@claim("samples and scores", "parameter-counts")
def check_parameter_counts():
    """The coursework's unrolled-GAN networks (chapter 03) have 675,025 and 1,460,225 parameters.

    Course: yes. A linear layer has (in + 1) out, a transposed convolution in out k² + out.
    """
    G = [nn.Linear(50, 500), nn.Linear(500, 500), nn.Linear(500, 784),
         nn.ConvTranspose2d(16, 16, 4), nn.ConvTranspose2d(16, 8, 4), nn.ConvTranspose2d(8, 1, 3)]
    D = [nn.Linear(784, 1024), nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, 1)]
    counts = [sum(p.numel() for layer in net for p in layer.parameters()) for net in (G, D)]
    return Outcome("675,025 and 1,460,225", f"{counts[0]:,} and {counts[1]:,}",
                   counts == [675_025, 1_460_225])


# --- figures -----------------------------------------------------------------------------------

def new_figure(n, title, width=4):
    """A row of n panels, `width` inches each."""
    fig, axes = common.plt.subplots(1, n, figsize=(width * n, 3.2), squeeze=False,
                                    layout="constrained")
    fig.suptitle(title, fontsize=11)
    return fig, axes[0]


def figure_receptive_field():
    """Size of the receptive field, and pixels per output, layer by layer."""
    fig, axes = new_figure(2, "Receptive field: what four layers see, and what it costs")
    for name, net in GROWTH.items():
        found = [receptive_field(net[:i])[:2] for i in range(len(net) + 1)]
        x = [4 * i / len(net) for i in range(len(net) + 1)]
        for ax, values in zip(axes, zip(*found)):
            ax.plot(x, values, marker="o", markersize=3, label=name,
                    linestyle="--" if name == "dilation" else "-")
    axes[0].set(title="size, pixels (stride 2 and dilation agree)", xlabel="convolutions")
    axes[1].set(title="stride: pixels per output", xlabel="convolutions", yscale="log")
    axes[1].set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes[0].legend()
    return fig


def figure_finite_difference():
    """Error of finite differences in eps: a U for both, with its lowest point elsewhere."""
    fig, (ax,) = new_figure(1, "Finite differences of exp(sin x), float64")
    powers = [-12 + 0.1 * i for i in range(121)]
    x = torch.linspace(-2, 2, 51, dtype=torch.float64)
    errors = difference_errors(x, powers)
    eps = [10 ** p for p in powers]
    for i, (name, best) in enumerate((("forward", 1 / 2), ("central", 1 / 3))):
        line, = ax.loglog(eps, errors[:, i], label=name)
        ax.axvline(2.2e-16 ** best, color=line.get_color(), linestyle=":")
    ax.set(xlabel="eps (dotted: (2e-16)^(1/2), (2e-16)^(1/3))", ylabel="mean error")
    ax.legend()
    return fig


def figure_saturation():
    """The generator's gradient against D(G(z)), in the logit and with respect to D's output."""
    fig, axes = new_figure(2, "Which gradient reaches G?")
    a = torch.linspace(-6, 6, 200, dtype=torch.float64)
    D = torch.sigmoid(a)
    for name, slope in zip(("minimax  log(1 - D)", "non-saturating  -log D"),
                           generator_slopes(a)):
        axes[0].plot(D, slope, label=name)
        axes[1].plot(D, slope / (D * (1 - D)), label=name)  # undo the sigmoid's slope
    axes[0].set(title="d loss / d logit: what G gets", xlabel="D(G(z))")
    axes[1].set(title="d loss / d D: explodes at 0 or 1", xlabel="D(G(z))", ylim=(-20, 0))
    axes[0].legend()
    return fig


def figure_js_w1():
    """JSD and W1 of two parallel lines against their distance."""
    fig, (ax,) = new_figure(1, "Two parallel lines at distance d")
    d = torch.linspace(-1, 1, 201)
    ax.plot(d, torch.full_like(d, math.log(2)), "C0", label="JSD: log 2, no slope, but 0 at 0")
    ax.plot(0, math.log(2), "o", color="C0", markerfacecolor="white")
    ax.plot(d, d.abs(), "C1", label="W1: slope 1 everywhere")
    ax.plot(0, 0, "o", color="C0")
    ax.set(xlabel="d", ylabel="nats, or distance", ylim=(-0.05, 1.4))
    ax.legend()
    return fig


def figure_bilinear():
    """Trajectories of the bilinear game: plain, alternating, rollback, exact."""
    kinds = {"plain": {}, "alternating": dict(alternating=True),
             "rollback, k = 1": dict(k=1, exact=False), "rollback, k = 5": dict(k=5, exact=False),
             "exact, k = 1": dict(k=1), "exact, k = 5": dict(k=5)}
    fig, axes = new_figure(6, "V = x y, x descends, y ascends, η = 0.1, 150 steps from (1, 0)", 2.6)
    for ax, (name, kind) in zip(axes, kinds.items()):
        path = [(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))]
        for _ in range(150):
            path.append(bilinear_step(*path[-1], 0.1, **kind))
        ax.plot(*torch.tensor(path).T, linewidth=1)
        ax.plot(1, 0, "o", color="black", markersize=4)
        ax.set(title=f"{name}\nlength x {bilinear_growth(0.1, **kind):.3f} a step",
               xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    return fig


def figure_three_points():
    """A law with a normal's first five moments, beside the normal density."""
    fig, (ax,) = new_figure(1, "Both: mean 0, variance 1, kurtosis 3")
    z = torch.linspace(-4, 4, 200)
    ax.plot(z, (-z ** 2 / 2).exp() / math.sqrt(2 * math.pi), label="N(0, 1), density")
    ax.stem(THREE_POINTS, THREE_WEIGHTS, linefmt="C1-", markerfmt="C1o", basefmt=" ",
            label="three points, probability")
    ax.set(xlabel="z", ylim=(0, 1))
    ax.legend()
    return fig


def figure_fingerprints():
    """The floor of a smoothed label, and what a second sigmoid makes of Loss_D and Loss_G."""
    fig, axes = new_figure(2, "Two constants of a GAN's log")
    a = torch.linspace(-6, 8, 300, dtype=torch.float64)
    for label in (1.0, 0.9, 0.7):
        loss = F.binary_cross_entropy_with_logits(a, torch.full_like(a, label), reduction="none")
        line, = axes[0].plot(a, loss, label=f"real label {label}")
        if label < 1:
            axes[0].axhline(binary_entropy(label), color=line.get_color(), linestyle=":")
    axes[0].set(title="smoothing: no loss below H(label)", xlabel="D's logit on a real picture",
                ylim=(0, 2))
    axes[0].legend()
    s = a.clamp(min=0)
    for name, f, colour in (("once", lambda a: a, "C0"), ("twice", torch.sigmoid, "C3")):
        axes[1].plot(s, F.softplus(-f(s)) + F.softplus(f(-s)), colour, label=f"Loss_D, {name}")
        axes[1].plot(s, F.softplus(-f(-s)), colour, linestyle="--", label=f"Loss_G, {name}")
    axes[1].set(title="sigmoid twice: 1.0064 and 0.6931", xlim=(0, 8), ylim=(0, 2),
                xlabel="D's logit: +a on reals, -a on fakes")
    axes[1].legend()
    return fig


FIGURES = {"receptive_field": figure_receptive_field, "saturation": figure_saturation,
           "finite_difference": figure_finite_difference, "js_w1": figure_js_w1,
           "bilinear": figure_bilinear, "three_points": figure_three_points,
           "fingerprints": figure_fingerprints}


# --- main --------------------------------------------------------------------------------------

def verdict(holds):
    return "holds" if holds else "refuted"


def run(name, seeds):
    """An outcome of a claim's check, and how many of `seeds` give the claim's verdict.

    The first outcome, or the first with the other verdict if there is one.
    """
    outcomes = []
    for seed in seeds:
        torch.manual_seed(seed)
        outcomes.append(CLAIMS[name].check())
    wrong = [outcome for outcome in outcomes if outcome.holds != CLAIMS[name].holds]
    return (wrong or outcomes)[0], len(outcomes) - len(wrong)


def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("claims")
    g.add_argument("--only", nargs="+", metavar="ID", help="check these claims alone, no pictures")
    g.add_argument("--list", action="store_true", help="say what each claim states, check nothing")
    args = p.parse_args(argv)
    unknown = [name for name in args.only or [] if name not in CLAIMS]
    if unknown:
        common.fail(f"no claim is called {unknown[0]!r}: see --list")
    args.device = "cpu"  # float64: some accelerators have none
    return args


def statement(check):
    """The first paragraph of a check's docstring, on one line."""
    return " ".join(check.__doc__.strip().split("\n\n")[0].split())


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        common.print_table(["claim", "verdict", "statement"], [
            [name, verdict(c.holds), statement(c.check)] for name, c in CLAIMS.items()])
        return
    common.start(args)
    seeds = range(args.seed, args.seed + (1 if args.quick else SEEDS))
    names = [name for name in CLAIMS if name in args.only] if args.only else list(CLAIMS)
    show, rows, unexpected = common.progress("checks", len(names), 1), {}, []
    for step, name in enumerate(names, 1):
        outcome, right = run(name, seeds)
        text = verdict(outcome.holds)
        if right < len(seeds):
            unexpected.append(name)
            text += f", but {verdict(CLAIMS[name].holds)} expected ({right} of {len(seeds)} seeds)"
        rows[name] = [name, outcome.expected, outcome.measured, text]
        show(step)
    for topic in dict.fromkeys(CLAIMS[name].topic for name in names):
        print(f"\n{topic}")
        common.print_table(["claim", "expected", "measured", "verdict"],
                           [row for name, row in rows.items() if CLAIMS[name].topic == topic])
    print()
    if not args.only:
        for name, draw in FIGURES.items():
            common.save_figure(draw(), args.out / f"{name}.png")
    if unexpected:
        common.fail(f"not the expected verdict: {', '.join(unexpected)}", status=1)
    print(f"all {len(names)} verdicts as expected, for each of {len(seeds)} seeds")


if __name__ == "__main__":
    main()
