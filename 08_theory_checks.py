r"""08 - Theory checks: both sides of every claim are computed.

Paper    The claims are statements and questions of four coursework reports, and
         textbook facts behind them. Papers are named beside the claims.
Idea     A theme is a generator of rows. Its docstring gives the reasons. A row
         states a claim beside the computation that decides it  -> holds()
         or beside a counterexample, if the claim is wrong      -> refuted()
See      A table for each topic: claim, what the claim says, what was measured,
         verdict. 85 claims: 60 hold, 25 are refuted. Exit status 1 if the
         evidence for a verdict fails for one of 5 seeds. Four figures:
         receptive_field, transposed_coverage, fingerprints, bilinear.
Read     "One report states" or "asks": one of the four does. Verdicts are ours.
         x [B, d]: x has the shape (B, d). σ: the sigmoid. nats: natural logs.
Differs  No data and nothing from other chapters; float64 or float32 on the CPU.
Try      Take "+ lam * w2" out of mlp_grads. Which of the claims mlp-grads and
         mlp-backprop loses its evidence? Predict it, then run both (--only).
Run      python 08_theory_checks.py
         python 08_theory_checks.py --predict --only optimal-d g-loss-alone
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
import sys
import textwrap
from collections import namedtuple

import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

import common

SEEDS = 5         # a verdict counts only if the evidence confirms it for all of them
ROUNDING = 1e-10  # float64 has 16 digits; what is exact on paper agrees to at least 10


# --- the idea ----------------------------------------------------------------------------------

# A row is a claim with its result: the claim says `claimed`, the computation gave `measured`;
# evidence: True if that confirms the verdict.
Row = namedtuple("Row", "verdict name statement claimed measured evidence")
holds, refuted = functools.partial(Row, "holds"), functools.partial(Row, "refuted")
# what is known of a claim before it is checked; theme: the generator that yields its row
Claim = namedtuple("Claim", "topic theme verdict statement")

TOPICS = {}   # the introduction of each topic; a theme belongs to the last one above it
CLAIMS = {}   # by name, in the order of this file
FIGURES = {}  # by file name: a function that makes the figure


def theme(check):
    """Decorator of a generator of rows, whose docstring gives the reasons.
    Its claims are read from its source, because --list computes nothing: the first two arguments of
    holds() and refuted() are written out as texts."""
    for node in ast.walk(ast.parse(inspect.getsource(check))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("holds", "refuted"):
            name, statement = map(ast.literal_eval, node.args[:2])
            assert name not in CLAIMS, f"two claims are called {name}"
            CLAIMS[name] = Claim(list(TOPICS)[-1], check, node.func.id, statement)
    return check


# three comparisons; each returns claimed, measured, evidence

def exactly(expected, measured):
    """The claim is that measured is exactly what is expected, a list of values or a text."""
    texts = (value if isinstance(value, str) else ", ".join(f"{v:,.10g}" for v in value)
             for value in (expected, measured))
    return *texts, measured == expected


def agree(expected, measured, unit="", tolerance=ROUNDING, note="", and_also=True):
    """The claim is that two numbers agree, to `tolerance` times max(1, |expected|).
    note: shown beside what was measured. and_also: a second condition that must be true."""
    close = abs(measured - expected) <= tolerance * max(1, abs(expected))
    text = f"{measured:.6g} {unit}".strip() + f" ({note})" * bool(note)
    return f"{expected:.6g} {unit}".strip(), text, close and bool(and_also)


def equal(*pairs, note="", and_also=True):
    """The claim is that tensors are equal, pair by pair: no entry differs by more than rounding."""
    differences = torch.stack([(a - b).abs().max().double() for a, b in pairs])
    worst = differences.max().item()  # torch's max, unlike Python's, never loses a nan
    text = f"difference {worst:.1g}" + f" ({note})" * bool(note)
    return "difference 0", text, worst <= ROUNDING and bool(and_also)


double = functools.partial(torch.tensor, dtype=torch.float64)  # double([1.0, 2.0])
normal = functools.partial(torch.randn, dtype=torch.float64)   # normal(3, 4): standard normal


def gradient(f, *inputs):
    """∂f/∂input by autograd: a tensor for one input, a tuple for several."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(f(*inputs), inputs)
    return grads[0] if len(grads) == 1 else grads


def figure(name, title, rows, columns, width=4.5, height=3.8):
    """Decorator of plot(*axes): FIGURES[name]() makes the figure, panels of width x height inch."""
    def add(plot):
        def make():
            fig, axes = common.figure(rows, columns, width * columns, height * rows, title)
            plot(*axes.flat)
            for ax in axes.flat:
                if ax.get_legend_handles_labels()[0]:  # below the panel, where it hides no data
                    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
            for _ in range(2):  # the layout needs the size of all texts; the second time it has it
                fig.draw_without_rendering()
            return fig
        FIGURES[name] = make
        return plot
    return add


# --- layers ------------------------------------------------------------------------------------

TOPICS["layers"] = """What does one output of a network see of its input, and how does a gradient
    find its way back through a layer? The first claims count pixels; each of the others is about
    one layer, and small enough to be computed by hand."""

# a layer is (kernel, stride, padding, dilation) along one axis; kernels are square
CONV, POOL = (3, 1, 1, 1), (2, 2, 0, 1)
ALEXNET = [(11, 4, 2, 1), (3, 2, 0, 1), (5, 1, 2, 1), (3, 2, 0, 1)] + 3 * [CONV] + [(3, 2, 0, 1)]
VGG_A = 2 * [CONV, POOL] + 3 * [CONV, CONV, POOL]
VGG_16 = 2 * [CONV, CONV, POOL] + 3 * [CONV, CONV, CONV, POOL]
# MobileNet's 1x1 convolutions widen nothing and are left out
MOBILENET = [(3, s, 1, 1) for s in (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)]
DCGAN_D = 4 * [(4, 2, 1, 1)] + [(4, 1, 0, 1)]  # DCGAN's discriminator D
GROWTH = {"plain": 4 * [CONV], "stride 2": 4 * [(3, 2, 1, 1)],
          "pooling": 4 * [CONV, POOL], "dilation": [(3, 1, d, d) for d in (1, 2, 4, 8)]}


def resnet_50(stride_in):
    """The list of layers on the path through the 3x3 convolutions (the shortcuts see less).
    stride_in: which convolution of a stage's first block has the stride, "1x1" or "3x3"."""
    layers = [(7, 2, 3, 1), (3, 2, 1, 1)]
    for blocks, stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
        for s in [stride] + [1] * (blocks - 1):
            layers += [(1, s, 0, 1), CONV] if stride_in == "1x1" else [(3, s, 1, 1)]
    return layers


def receptive_field(layers):
    """What an output of a stack of layers sees: (size, stride, padding) of the stack as one layer.
    layers: (kernel, stride, padding, dilation) along one axis of each convolution or pooling, from
    the input on. Output j sees the inputs j stride - padding ... j stride - padding + size - 1. An
    empty stack is (1, 1, 0). After k layers the size is r_k = r_{k-1} + (g_k - 1) Π_{i<k} s_i: s_i
    is the stride of layer i, and g_k = dilation (kernel - 1) + 1 the length of kernel k.
    Raises ValueError for a kernel, stride or dilation below 1."""
    size, stride, padding = 1, 1, 0
    for kernel, s, p, dilation in layers:
        if min(kernel, s, dilation) < 1:
            raise ValueError(f"kernel {kernel}, stride {s}, dilation {dilation}: from 1 on")
        size += dilation * (kernel - 1) * stride
        padding += p * stride
        stride *= s
    return size, stride, padding


@theme
def receptive_fields():
    """A kernel of layer k covers g_k - 1 steps of Π_{i<k} s_i pixels each. One report states that
    padding matters as well, but it moves the field and does not widen it. ResNet-50 has the stride
    of a stage in its first 3x3 (torchvision) or in the 1x1 before (He et al. 2016). "31/16": an
    output sees 31 pixels, one for every 16. YOLO (Redmon et al. 2016) predicts boxes and classes at
    once: S = 7 cells a side, B = 2 boxes, C = 20 classes. Faster R-CNN (Ren et al. 2015) first asks
    a region proposal network (RPN) with k = 9 boxes where to look, then what is there."""
    right = 0
    for _ in range(20):  # random networks, padded by 0 to 3 pixels in each layer
        depth = torch.randint(1, 5, ()).item()
        layers = (torch.randint(4, (depth, 4)) + torch.tensor([1, 1, 0, 1])).tolist()
        size, stride, padding = receptive_field(layers)
        j = math.ceil(padding / stride)  # the first output that looks at no padding
        first = j * stride - padding
        x = y = torch.ones(1, 1, 2 * (first + size), requires_grad=True)
        for kernel, s, p, dilation in layers:
            y = F.conv1d(y, torch.ones(1, 1, kernel), None, s, p, dilation)
        seen = torch.autograd.grad(y[0, 0, j], x)[0][0, 0].nonzero()
        right += (seen.min().item(), seen.max().item()) == (first, first + size - 1)
    yield holds("rf-recursion", "The receptive field is r_k = r_{k-1} + (g_k - 1) Π_{i<k} s_i, "
                "g = dilation (kernel - 1) + 1.", *agree(20, right, "of 20 networks"))
    nets = ALEXNET, VGG_16, MOBILENET, DCGAN_D, resnet_50("3x3"), resnet_50("1x1")
    yield holds("rf-nets", "AlexNet sees 195 pixels, VGG-16 212, MobileNet v1 315, DCGAN's D 94, "
                "ResNet-50 427, or 483 with strides in the 1x1.", *exactly(
                    [195, 212, 315, 94, 427, 483], [receptive_field(net)[0] for net in nets]))
    alexnet, vgg = ([receptive_field(net[:i + 1])[0] for i in range(len(net))]
                    for net in (ALEXNET, VGG_A))
    yield holds("rf-alexnet", "AlexNet's layers, conv1 to pool5, see 11 to 195 pixels.",
                *exactly([11, 19, 51, 67, 99, 131, 163, 195], alexnet))
    yield holds("rf-vgg-a", "VGG-A's 8 convolutions and 5 poolings, in order, see 3 to 150 pixels.",
                *exactly([3, 4, 8, 10, 18, 26, 30, 46, 62, 70, 102, 134, 150], vgg))
    growth = ["{} {}/{}".format(name, *receptive_field(net)[:2]) for name, net in GROWTH.items()]
    yield holds("rf-growth", "Stride and pooling multiply later growth and cost resolution; "
                "dilation costs none.", *exactly(
                    "plain 9/1, stride 2 31/16, pooling 46/16, dilation 31/1", ", ".join(growth)))
    yolo = [(7, 2, 3, 1), *4 * [POOL], (3, 2, 1, 1)]  # the layers that have strides
    yield holds("detector-shapes", "An RPN gives 2k scores and 4k offsets for every 16 pixels, "
                "YOLO v1 gives S x S x (5 B + C) = 7 x 7 x 30.", *exactly(
                    [16, 7], [receptive_field(VGG_16[:-1])[1], 448 / receptive_field(yolo)[1]]))


@figure("receptive_field", "Receptive field: what four layers see, and what it costs", 1, 2)
def plot_receptive_field(*panels):
    for name, net in GROWTH.items():
        found = zip(*(receptive_field(net[:i])[:2] for i in range(len(net) + 1)))
        x = [4 * i / len(net) for i in range(len(net) + 1)]  # a pooling is half a step
        for ax, values in zip(panels, found):
            ax.plot(x, values, "o--" if name == "dilation" else "o-", markersize=3, label=name)
    sizes, strides = panels
    sizes.set(title="stride 2 and dilation: the same line", xlabel="number of convolutions",
              ylabel="pixels that one output sees")
    strides.set(title="plain and dilation: the same line", xlabel="number of convolutions",
                ylabel="pixels between outputs", yscale="log")
    strides.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])


def masks(n, p):
    """All 2^n dropout masks [2^n, n] and their probabilities [2^n]; p: probability of a 0."""
    m = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    return m, (m * (1 - p) + (1 - m) * p).prod(dim=1)


def dropout_mask_average(x, p, f=lambda x: x):
    """Exact E f(x m / (1 - p)) over all 2^n masks m, which keep an entry with probability 1 - p.
    x [n]; f maps [n] to a tensor; the identity if left out. n up to about 15. Raises ValueError
    unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"p = {p}: must be in [0, 1)")
    m, probability = masks(len(x), p)
    return sum(w * f(x * mask / (1 - p)) for w, mask in zip(probability, m))


@theme
def dropout():
    """In one report the proof of dropout-scale lacks the mask m, without which nothing is random: E
    m x / (1 - p) = (1 - p) x / (1 - p) + p 0 = x. One report calls dropout-place false, and it is:
    relu(x m) = relu(x) m for every mask m. The sigmoid turns a dropped 0 into 1/2."""
    x, p = normal(8), 0.3
    exact, square = dropout_mask_average(x, p), dropout_mask_average(x, p, torch.square)
    yield holds("dropout-scale", "Scaling by 1/(1 - p) keeps the expectation: E dropout(x) = x.",
                *equal((exact, x), (square, x ** 2 / (1 - p))))
    merged, single = masks(4, 1 - (1 - 0.2) * (1 - 0.5))
    twice = sum(w1 * w2 * (merged == m1 * m2).all(dim=1)
                for m1, w1 in zip(*masks(4, 0.2)) for m2, w2 in zip(*masks(4, 0.5)))
    yield holds("dropout-merge", "Dropout(p1) then Dropout(p2) is Dropout(1 - (1 - p1)(1 - p2)).",
                *equal((twice, single)))
    x, m = normal(100), (torch.rand(100) < 0.5).double()
    relu, sigmoid = ((f(x * m) - f(x) * m).abs().max().item() for f in (torch.relu, torch.sigmoid))
    yield refuted("dropout-place", "Dropout must come after the activation, not before.",
                  "ReLU: not 0", f"ReLU {relu:g}, sigmoid {sigmoid:g}", relu == 0 and sigmoid > 0)


def check_conv(x_size, w_size, y_size, *how):
    """Raises ValueError, or torch's RuntimeError, unless the convolution of x with w gives y.
    The sizes have four entries each; how: stride, padding, dilation, groups."""
    x, w = (torch.empty(*size, device="meta") for size in (x_size, w_size))  # sizes, no values
    if F.conv2d(x, w, None, *how).shape != tuple(y_size) or min(y_size[2:]) == 0:
        raise ValueError(f"the convolution of {x_size} with {w_size} does not give {y_size}: {how}")


def conv2d_grad_input(input_size, weight, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """∂L/∂x of y = conv2d(x, weight): each ∂L/∂y goes back, times w, to the pixels it came from.
    On one axis ∂L/∂x[i s + u d - p] += w[u] ∂L/∂y[i], for output i, kernel entry u, stride s,
    dilation d and padding p. Arguments and result as in torch.nn.grad.conv2d_input: input_size
    [B, C, H, W], weight [O, C / groups, h, w], grad_output [B, O, H', W'], in any memory layout.
    Raises ValueError or RuntimeError if the sizes do not fit."""
    check_conv(input_size, weight.shape, grad_output.shape, stride, padding, dilation, groups)
    grad = grad_output.flatten(2).unflatten(1, (groups, -1))         # [B, g, O/g, H' W']
    w = weight.flatten(1).unflatten(0, (groups, -1))                 # [g, O/g, C/g h w]
    patches = torch.einsum("bgol,gok->bgkl", grad, w).flatten(1, 2)  # [B, C h w, H' W']
    return F.fold(patches, input_size[2:], weight.shape[2:], dilation, padding, stride)


def conv2d_grad_weight(input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """∂L/∂w of y = conv2d(input, w): each weight meets one pixel of every patch of the image.
    On one axis ∂L/∂w[u] = Σ_i input[i s + u d - p] ∂L/∂y[i], as above, summed over the batch.
    Arguments and result as in torch.nn.grad.conv2d_weight: input [B, C, H, W], weight_size
    [O, C / groups, h, w]. Raises ValueError or RuntimeError if the sizes do not fit."""
    check_conv(input.shape, weight_size, grad_output.shape, stride, padding, dilation, groups)
    patches = F.unfold(input, weight_size[2:], dilation, padding, stride)
    patches = patches.unflatten(1, (groups, -1))                     # [B, g, C/g h w, H' W']
    grad = grad_output.flatten(2).unflatten(1, (groups, -1))         # [B, g, O/g, H' W']
    return torch.einsum("bgol,bgkl->gok", grad, patches).reshape(weight_size)


@theme
def convolutions():
    """One report states conv-grad-input and conv-grad-weight, with grad = ∂L/∂y. They are right if
    * is the true convolution, which flips its second factor, and wrong if it is a correlation, as
    conv2d is. In conv-transpose, output_padding=1 says that the input had 8 pixels, not 7. One
    report asks whether the linear layer at the start of G is important: DCGAN's G has none by name,
    but its first layer is one. In residual-filters f is linear, fitted by least squares."""
    def random_conv(x_size, w_size, y_size, **how):  # x, w, ∂L/∂y; by autograd ∂L/∂x and ∂L/∂w
        x, w, grad = normal(*x_size), normal(*w_size), normal(*y_size)
        return x, w, grad, *gradient(lambda x, w: (F.conv2d(x, w, **how) * grad).sum(), x, w)
    convolve = lambda a, b, padding=0: F.conv2d(a, b.flip(2, 3), padding=padding)
    how = dict(stride=2, padding=1, groups=2)
    image, f, grad, of_image, of_f = random_conv((1, 1, 7, 6), (1, 1, 3, 3), (1, 1, 5, 4))
    x, w, grad_y, of_x, of_w = random_conv((2, 4, 9, 8), (6, 2, 3, 3), (2, 6, 5, 4), **how)
    # padding=2 adds the places where the 3x3 filter touches only the rim of grad: 7 x 6 in all
    wrong = (of_image - F.conv2d(grad, f, padding=2)).abs().max().item()
    yield holds("conv-grad-input", "If y is image I correlated with filter f, ∂L/∂I = grad * f.",
                *equal((of_image, convolve(grad, f, padding=2)),
                       (of_x, conv2d_grad_input(x.shape, w, grad_y, **how)),
                       note=f"correlation: {wrong:.1f}", and_also=wrong > 0.1))
    wrong = (of_f - convolve(image, grad)).abs().max().item()
    yield holds("conv-grad-weight", "If y is I correlated with f, ∂L/∂f = I * flip(grad).",
                *equal((of_f, convolve(image, grad.flip(2, 3))),
                       (of_w, conv2d_grad_weight(x, w.shape, grad_y, **how)),
                       note=f"no flip: {wrong:.1f}", and_also=wrong > 0.1))
    _, w, grad, of_x, _ = random_conv((2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 4, 4), stride=2, padding=1)
    back = F.conv_transpose2d(grad, w, stride=2, padding=1, output_padding=1)
    yield holds("conv-transpose", "The gradient of a convolution in its input is a transposed "
                "convolution.", *equal((of_x, back)))
    first, z = nn.ConvTranspose2d(100, 8, kernel_size=4).double(), normal(16, 100, 1, 1)
    linear = z.flatten(1) @ first.weight.flatten(1) + first.bias.repeat_interleave(4 * 4)
    yield holds("linear-first-layer", "A transposed convolution on a 1x1 map is a linear layer.",
                *equal((first(z).flatten(1), linear)))
    x = normal(8, 1, 12, 12)
    y = F.conv2d(x, normal(1, 1, 3, 3)) + 0.3 * normal(8, 1, 10, 10)
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 9)  # [800, 9]: what each output sees
    plain, residual = (torch.linalg.lstsq(patches, target.reshape(-1, 1)).solution[:, 0]
                       for target in (y, y - x[..., 1:-1, 1:-1]))
    plain[4] -= 1  # the identity is 1 in the middle of the 3x3
    yield holds("residual-filters", "In y = f(x) + x the best linear filter f is the plain best "
                "filter minus the identity.", *equal((residual, plain)))


def transposed_coverage(layers, n=1):
    """How many paths lead from n inputs to each output of a stack of transposed convolutions.
    layers: (kernel, stride, padding) along one axis of each, from the input on. Returns float64
    [size], exact up to 2^53: a layer makes (n - 1) stride + kernel - 2 padding outputs of n. Where
    it is 0, an output is the same for every input. In a picture, pixel (i, j) has the product of
    the paths to i and to j. Raises ValueError if a padding leaves no output."""
    paths = torch.ones(n, dtype=torch.float64)
    for kernel, stride, padding in layers:
        spread = torch.zeros((len(paths) - 1) * stride + kernel, dtype=torch.float64)
        for u in range(kernel):
            spread[u:len(spread) - kernel + u + 1:stride] += paths
        if len(spread) <= 2 * padding:
            raise ValueError(f"{(kernel, stride, padding)} leaves nothing of {len(paths)} inputs")
        paths = spread[padding:len(spread) - padding]
    return paths


def covered(layers):
    """Which pixels of the square picture depend on the code, bool [size, size]."""
    along = transposed_coverage(layers) > 0
    return along[:, None] & along


# from a code of one pixel: 4, 8, 16; then the report's last two layers, and two that give 28
TO_16 = [(4, 1, 0), (4, 2, 1), (4, 2, 1)]
REPORT_G, FIXED_G = TO_16 + [(1, 1, 2), (1, 2, 1)], TO_16 + [(3, 1, 2), (4, 2, 1)]


@theme
def coverage():
    """One report asks why its GAN gets digits wrong every time. Its G ends in two kernels of 1:
    padding 2 cuts 16 to 12, and stride 2 with padding 1 spreads 12 to 21 with gaps. MNIST has 28x28
    pixels and a background of -1, so D needs only the background, and no loss or label can help."""
    def pictures(layers):  # of 20 codes
        x = torch.randn(20, 1, 1, 1)
        for kernel, stride, padding in layers:
            x = F.conv_transpose2d(x, torch.randn(1, 1, kernel, kernel), None, stride, padding)
        return x[:, 0]
    report, fixed = ((pictures(layers) != 0).any(dim=0) for layers in (REPORT_G, FIXED_G))
    text, note = ("{0}x{0}, {1:.1%} empty".format(len(seen), (~seen).double().mean())
                  for seen in (report, fixed))
    yield holds("transposed-coverage", "The DCGAN generator of a report makes 21x21 pictures; 77.3 "
                "% of their pixels are always 0.", "21x21, 77.3% empty", f"{text} (fixed: {note})",
                text == "21x21, 77.3% empty" and torch.equal(report, covered(REPORT_G))
                and torch.equal(fixed, covered(FIXED_G)))


@figure("transposed_coverage", "Which pixels depend on the code? White: these do. Black: these are "
        "always 0.", 1, 2)
def plot_transposed_coverage(*panels):
    for ax, layers, name in zip(panels, (REPORT_G, FIXED_G), ("the report's G", "a fixed G")):
        depends = covered(layers)
        ax.imshow(depends.numpy(), cmap="gray", vmin=0, vmax=1)
        last = ";\n".join("kernel {}, stride {}, padding {}".format(*one) for one in layers[-2:])
        size, share = len(depends), depends.double().mean()
        ax.set(title=f"{name}: {size} × {size} pixels, {share:.1%} white",
               xlabel=f"last two layers: {last}", xticks=[], yticks=[])


@theme
def lookups():
    """Output y_i of an elementwise activation depends on x_i only, so its Jacobian is diagonal. One
    report asks what an embedding is for. Looking up a row avoids products with 0. Indices have an
    order: a linear layer with a threshold says yes from some index on, or up to it, but words 0 to
    7 alternate between two classes. With one-hot vectors each word has its own weight."""
    x, grad = normal(6), normal(6)
    jacobian, derivative = jacrev(torch.tanh)(x), 1 - torch.tanh(x) ** 2
    yield holds("activation-jacobian", "Back through an elementwise activation f, multiply by f'.",
                *equal((jacobian, torch.diag(derivative)), (grad @ jacobian, grad * derivative)))
    w, index, grad = normal(5, 3), torch.randint(5, (2, 4)), normal(2, 4, 3)
    one_hot = F.one_hot(index, 5).double()
    looked_up = gradient(lambda w: (F.embedding(index, w) * grad).sum(), w)
    multiplied = gradient(lambda w: (one_hot @ w * grad).sum(), w)
    yield holds("embedding", "nn.Embedding(n, d) is one_hot @ W.",
                *equal((F.embedding(index, w), one_hot @ w), (looked_up, multiplied)))
    index = torch.arange(8)
    label = index % 2 == 1
    right = max(((index >= cut) ^ turned == label).sum().item()
                for cut in range(9) for turned in (False, True))
    one_hot = ((F.one_hot(index).float() @ (2.0 * label - 1) > 0) == label).sum().item()
    yield refuted("embedding-needed", "The index of a word can go into a linear layer as a number.",
                  "8 of 8 right", f"{right} of 8 (one-hot: {one_hot})", right < 8 == one_hot)


def self_attention(x, w_q, w_k, w_v):
    """softmax(Q Kᵀ / √d) V with Q = x w_q, K = x w_k, V = x w_v, x [n, d] (Vaswani 2017, eq. 1).
    w_q, w_k, w_v [d, d]. Returns the outputs [n, d] and the weights [n, n], whose rows sum to 1.
    Raises ValueError for a batch of x: it would attend across its sequences."""
    if x.ndim != 2:
        raise ValueError(f"x must be [n, d], one sequence, not {tuple(x.shape)}")
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    weights = (q @ k.T / k.shape[1] ** 0.5).softmax(dim=1)
    return weights @ v, weights


@theme
def attention():
    """Nothing in softmax(Q Kᵀ / √d) V knows the order of the rows (Vaswani et al. 2017 add
    positions). One report asks what attention changes in a decoder: each input is one step away,
    through weights from the decoder's state; the encoder's last state has almost lost the first."""
    x, w, order = normal(6, 4), normal(3, 4, 4), torch.randperm(6)
    out, weights = self_attention(x, *w)
    yield holds("attention-order", "Self-attention without positions is permutation-equivariant; "
                "outputs are averages of values.", *equal(
                    (self_attention(x[order], *w)[0], out[order]), (weights.sum(dim=1), 1)))
    x, w_x, decoder = normal(20, 3).requires_grad_(), normal(4, 3), normal(4)
    step = lambda h, one: torch.tanh(w_x @ one + h / 2)
    h = torch.stack([*itertools.accumulate(x, step, initial=0 * decoder)][1:])  # [20, 4]
    last, average = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0][0].norm().item()
                     for out in (h[-1], (h @ decoder / 2).softmax(dim=0) @ h))
    yield holds("attention-alignment", "With attention a decoder gets an average of all states of "
                "the encoder, not only the last.", "depends on input 1",
                f"gradient {average:.0e} (last state: {last:.0e})", average > 1e4 * last)


# --- losses, activations -----------------------------------------------------------------------

TOPICS["losses"] = """A network learns through the gradient of its loss, a product with a factor
    from every layer. Small factors make it vanish, large ones make it explode, and a factor of zero
    stops it. The last three claims are about counting: what a score and a label say."""


@theme
def factors():
    """One report states 0.3 and 0.798. The reason to prefer cross-entropy is its gradient in the
    logit a, where p = σ(a): p - 1, against 2 (p - 1) p (1 - p), which vanishes if the network is
    sure and wrong. σ' is at most 1/4, tanh' is 1 at 0: with torch's initialisation the first of 24
    layers gets 2e14 to 4e14 times more gradient from tanh, and Xavier's (Glorot, Bengio 2010) cures
    tanh. Weights of standard deviation √(2 / width) preserve the gradient of ReLU (He et al. 2015);
    smaller weights do not. The loss stops moving if gradients vanish, but also in a minimum and
    with a learning rate of 0. The size of the gradient at output and input tells these apart."""
    p, a = 0.45, double(-10.0)
    text = f"{(p - 1) ** 2:.4f}, {-math.log(p):.4f}"
    of_l2, of_bce = (gradient(loss, a).item() for loss in (
        lambda a: (torch.sigmoid(a) - 1) ** 2, lambda a: -F.logsigmoid(a)))
    yield holds("bce-vs-l2", "At p = 0.45 for label 1: squared error 0.3025, cross-entropy 0.7985.",
                "0.3025, 0.7985", f"{text} (gradients at a = -10: {of_l2:.0e}, {of_bce:.4f})",
                text == "0.3025, 0.7985" and abs(of_l2) < 1e-4 and of_bce < -0.999)
    def first_over_last(activation, init=None):  # gradients of the weights of layers 1 and 24
        layers = [nn.Linear(32, 32).double() for _ in range(24)]
        x = normal(32, 32)
        for layer in layers:
            if init:
                init(layer.weight)
                nn.init.zeros_(layer.bias)
            x = activation(layer(x))
        first, last = torch.autograd.grad((x * normal(32, 32)).sum(),
                                          [layers[0].weight, layers[-1].weight])
        return (first.norm() / last.norm()).item()
    sigmoid, sigmoid_xavier, tanh, tanh_xavier = (
        first_over_last(f, init) for f in (torch.sigmoid, torch.tanh)
        for init in (None, nn.init.xavier_normal_))
    yield refuted("sigmoid-tanh", "Tanh in place of sigmoid makes no difference to vanishing "
                  "gradients.", "about the same", f"{sigmoid:.0e}, {tanh:.0e}: "
                  f"{tanh / sigmoid:.0e} times (Xavier: {sigmoid_xavier:.0e}, {tanh_xavier:.2g})",
                  tanh > 1e12 * sigmoid and sigmoid_xavier < 1e-9 and 0.05 < tanh_xavier < 20)
    network = lambda w, x: functools.reduce(lambda x, layer: torch.relu(layer @ x), w, x)
    w, x, y = (2 / 32) ** 0.5 * normal(20, 32, 32), normal(32), normal(32)
    he, small = (gradient(lambda x: network(v, x).sum(), x).norm().item() for v in (w, w / 7))
    yield refuted("relu-vanish", "In a ReLU network gradients cannot vanish.", "about the same",
                  f"weights / 7: {small / he:.0e} of that", abs(small / he * 7 ** 20 - 1) <= 1e-8)
    def one_step(w, y, lr):  # change of the loss; size of its gradient at output and input
        loss = lambda w, x: ((network(w, x) - y) ** 2).sum() / 2
        change = loss(w - lr * gradient(lambda w: loss(w, x), w), x) - loss(w, x)
        sizes = (network(w, x) - y).norm(), gradient(lambda x: loss(w, x), x).norm()
        return change.item(), *(size.item() for size in sizes)
    explodes, vanishes, minimum, no_step = (one_step(*run) for run in (
        (3 * w, y, 0.01), (w / 7, y, 0.01), (w, network(w, x), 0.01), (w, y, 0.0)))
    yield holds("loss-tells-which", "If gradients vanish or explode, the loss alone tells which of "
                "the two.", "jumps, or stops moving", f"change {explodes[0]:.0e}, or "
                f"{vanishes[0]:.0e} (minimum {minimum[0]:.0e}, learning rate 0 {no_step[0]:.0e})",
                not explodes[0] < 1e6 and vanishes[2] < 1e-9 and minimum[1:] == (0, 0)
                and all(abs(run[0]) < ROUNDING for run in (vanishes, minimum, no_step))
                and 0.01 < min(vanishes[1], *no_step[1:]))
    products = [gradient(lambda x: math.prod(10 * [factor], start=x), torch.tensor(1.0)).item()
                for factor in (0.5, 5.0)]
    yield holds("depth-numbers", "Ten layers that multiply by 0.5 or by 5: gradients 0.5^10, 5^10.",
                *exactly([0.5 ** 10, 5 ** 10], products))


@theme
def relu():
    """One report calls relu-linear false: the gradient is constant there. One report states
    relu-sign, but ReLU passes a gradient of either sign where its *input* is positive; guided
    backpropagation (Springenberg et al. 2015) drops negative ones. A step that moves the bias too
    far, here to -50, makes a unit die. In a hidden layer the inputs change and may revive it."""
    of_relu = gradient(lambda x: torch.relu(x).sum(), torch.tensor([1.0, 2.0, 3.0])).tolist()
    yield refuted("relu-linear", "Where its input is positive, ReLU's gradient is linear in it.",
                  "1 : 2 : 3", " : ".join(f"{s:g}" for s in of_relu), of_relu == [1, 1, 1])
    x, grad = normal(1000), normal(1000)
    passed = gradient(lambda x: (torch.relu(x) * grad).sum(), x)
    negative = (passed < 0).sum().item()
    yield refuted("relu-sign", "ReLU only propagates positive gradients.", "0 negative",
                  f"{negative} of {(passed != 0).sum()} negative",
                  negative > 100 and torch.equal(passed, grad * (x > 0)))
    x, w, b = normal(1000, 4), normal(4), double(-50.0)
    unit = lambda x: (torch.relu(x @ w + b),
                      *gradient(lambda w, b: torch.relu(x @ w + b).sum(), w, b))
    back = unit(x + 60 * w / (w @ w))[2].item()  # inputs that moved: w.x is higher by 60
    yield holds("relu-dead", "ReLU units can die: zero output and zero gradient on all data.",
                *equal(*((value, 0) for value in unit(x)), and_also=back > 900,
                       note=f"moved inputs: alive for {back:g} of 1000"))


def average_precision(hits, objects):
    """AP of one class: Σ over the hits of the precision there, over the number of objects.
    hits: for each detection, the most confident first, whether it finds an object that none before
    it has found; a list or a tensor of n booleans, or 0 and 1. Precision: the share of hits so far,
    without the interpolation of VOC and COCO. mAP is the mean over the classes. Returns a number.
    Raises ValueError for confidences in place of hits, and for more hits than objects, or none."""
    hits = torch.as_tensor(hits)
    if not ((hits == 0) | (hits == 1)).all() or not 0 < objects >= hits.sum():
        raise ValueError(f"hits must be true or false, and no more than {objects} objects, from 1")
    hits = hits.bool()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)
    return precision[hits].sum().item() / objects


def dice_from_iou(iou):
    """Dice = 2 IoU / (1 + IoU), because |A| + |B| = |A ∩ B| + |A ∪ B|.
    iou: a number or a tensor; the result is of the same kind. Raises ValueError outside [0, 1]."""
    if not ((0 <= torch.as_tensor(iou)) & (torch.as_tensor(iou) <= 1)).all():
        raise ValueError(f"IoU is in [0, 1], not {iou}")
    return 2 * iou / (1 + iou)


@theme
def counting():
    """One report asks what mAP is: the mean over the classes of the area under precision over
    recall, the share of objects found so far. IoU is |A ∩ B| / |A ∪ B| of two masks, Dice is 2 |A ∩
    B| / (|A| + |B|). One report states label-constraints: for each class k but the label it turns
    N(I) ≠ k, where N(I) is the network's answer to image I, into N(I) > k and N(I) < k. But N(I) ≠
    k means that one *or* the other is true."""
    hits = torch.rand(100, 30, dtype=torch.float64) < 0.5  # random lists
    found = hits.cumsum(1).double()
    area = (found / torch.arange(1, 31) * F.pad(found, (1, 0)).diff() / 40).sum(dim=1)
    apart = max(abs(a.item() - average_precision(h, 40)) for a, h in zip(area, hits))
    yield holds("average-precision", "Right, wrong, right on two objects: AP = (1 + 2/3) / 2, the "
                "area under precision over recall.", *agree(
                    5 / 6, average_precision([True, False, True], 2), and_also=apart < ROUNDING))
    a, b = torch.rand(2, 1000, 30) < torch.rand(2, 1000, 1)  # from nearly empty to nearly full
    both, either, sizes = (m.sum(dim=1).double() for m in (a & b, a | b, torch.cat([a, b], dim=1)))
    iou, dice = both / either.clamp(min=1), 2 * both / sizes.clamp(min=1)
    above = torch.where((iou > 0) & (iou < 1), dice > iou, dice == iou)
    yield holds("iou-dice", "Dice = 2 IoU / (1 + IoU), so Dice >= IoU, equal only at 0 and 1.",
                *equal((dice, dice_from_iou(iou)), and_also=above.all()))
    answer = 7  # N(I), the right one
    true = [(answer > k) + (answer < k) for k in range(1000)]
    yield refuted("label-constraints", "An ImageNet label gives 999 * 2 = 1998 inequalities.",
                  "1998", f"{sum(true)}, never 2 of one class", true.count(1) == 999 == sum(true))


# --- optimisation ------------------------------------------------------------------------------

TOPICS["optimisation"] = """Training is a chain of decisions: compute a gradient, estimate it from
    a small batch, and follow it. The claims go down that chain; the last ones ask what happens if
    the gradient is cut off or never reset, or if noise is added to the input."""


def mlp_loss(x, y, w1, b1, w2, b2, lam):
    """Mean binary cross-entropy (nats) of σ(relu(x W1ᵀ + b1) W2ᵀ + b2) with targets y, plus λ/2
    (‖W1‖² + ‖W2‖²), where ‖W‖² is the sum of all squared entries. The mean is over all entries of
    y; the shapes are those of mlp_grads. Returns a scalar tensor."""
    a2 = torch.relu(x @ w1.T + b1) @ w2.T + b2
    penalty = lam / 2 * (w1.pow(2).sum() + w2.pow(2).sum())
    return F.binary_cross_entropy_with_logits(a2, y) + penalty


def mlp_grads(x, y, w1, b1, w2, b2, lam):
    """Gradients of mlp_loss by hand: a dict of W1, b1, W2, b2, x, each shaped like its argument.
    x [B, d], y [B, K] with targets 0 to 1, w1 [H, d], b1 [H], w2 [K, H], b2 [K]. a1 = x W1ᵀ + b1,
    h = relu(a1), a2 = h W2ᵀ + b2. ∂a: ∂loss/∂a. ⊙: entry by entry. [a1 > 0]: 1 if true, else 0.
    ∂a2 = (σ(a2) - y) / (B K),  ∂W2 = ∂a2ᵀ h + λ W2,  ∂b2 = Σ_B ∂a2,
    ∂a1 = (∂a2 W2) ⊙ [a1 > 0],  ∂W1 = ∂a1ᵀ x + λ W1,  ∂b1 = Σ_B ∂a1,  ∂x = ∂a1 W1."""
    a1 = x @ w1.T + b1
    h = a1.clamp(min=0)
    a2 = h @ w2.T + b2
    d_a2 = (a2.sigmoid() - y) / y.numel()
    d_a1 = (d_a2 @ w2) * (a1 > 0)
    return {"W1": d_a1.T @ x + lam * w1, "b1": d_a1.sum(dim=0),
            "W2": d_a2.T @ h + lam * w2, "b2": d_a2.sum(dim=0), "x": d_a1 @ w1}


def numeric_grad(f, x, eps=6e-6):
    """Central differences: ∂f/∂x_i ≈ (f(x + eps e_i) - f(x - eps e_i)) / (2 eps), for all i.
    f: tensor like x -> scalar; x: float64. Returns a tensor of x's shape, without a graph; f is
    called twice for each entry. The error is about eps² |f'''| / 6 + 2e-16 |f| / eps: smallest near
    eps = (2e-16)^(1/3) = 6e-6. Raises ValueError for an x of another type, such as float32."""
    if x.dtype != torch.float64:
        raise ValueError(f"x is {x.dtype}: differences need float64, x.double()")
    x, grad = x.detach(), x.new_zeros(x.shape)  # contiguous, as view needs; zeros_like may not be
    for i in range(x.numel()):
        step = x.new_zeros(x.shape)
        step.view(-1)[i] = eps
        grad.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad


@theme
def backpropagation():
    """One report writes λ ‖W‖_F for the gradient of its regulariser. It is λ W, an entry for each
    weight; ‖W‖_F, the root of the sum of all squared entries, is one number. In one report the
    output y of mlp-backprop lacks a sigmoid, so it can be any number, but the loss takes the logs
    of y and 1 - y, and the products lack the transposes. In numeric-grad cutting the Taylor series
    costs eps (forward) or eps² (central), and rounding costs 2e-16 / eps."""
    w, lam = normal(3, 4), 0.1
    right = gradient(lambda w: lam / 2 * w.pow(2).sum(), w)
    as_number, as_matrix = ((right - r).abs().max().item() for r in (lam * w.norm(), lam * w))
    yield refuted("mlp-grads", "The regulariser λ/2 ‖W‖_F² has the gradient λ ‖W‖_F.",
                  "difference 0", f"{as_number:.2f} (with λ W: {as_matrix:.0e})",
                  as_matrix <= ROUNDING < as_number)
    x, y = normal(60, 5), torch.randint(2, (60, 1)).double()
    w1, b1, w2, b2 = parameters = normal(16, 5), normal(16), normal(1, 16), normal(1)
    by_autograd = gradient(lambda x, *p: mlp_loss(x, y, *p, 0.1), x, *parameters)
    by_hand = mlp_grads(x, y, *parameters, lam=0.1)
    output = torch.relu(x @ w1.T + b1) @ w2.T + b2
    no_log = ((output <= 0) | (output >= 1)).sum().item()
    yield holds("mlp-backprop", "mlp_grads differentiates two layers, cross-entropy and λ/2 ‖W‖².",
                *equal(*zip(by_autograd, map(by_hand.get, ("x", "W1", "b1", "W2", "b2"))),
                       note=f"no σ: no log for {no_log} of 60", and_also=no_log > 0))
    f, x, powers = lambda x: x.sin().exp(), normal(50), [-12 + 0.25 * i for i in range(45)]
    of_f = gradient(lambda x: f(x).sum(), x)
    difference = (numeric_grad(lambda x: f(x).sum(), x) - of_f).abs().max().item()
    error = lambda eps, back: ((f(x + eps) - f(x - back)) / (eps + back) - of_f).abs().mean().item()
    forward = min(powers, key=lambda power: error(10 ** power, 0))
    central = min(powers, key=lambda power: error(10 ** power, 10 ** power))
    yield holds("numeric-grad", "Central differences match autograd; best eps ≈ 1e-8 forward, 6e-6 "
                "central.", "1e-8, 6e-6", f"{10 ** forward:.0e}, {10 ** central:.0e} (difference "
                f"{difference:.0e})",
                difference < 1e-8 and abs(forward + 8) < 1.1 and abs(central + 5.2) < 1.1)


@theme
def batches():
    """One report defines SGD by one random sample a step, and mini-batch SGD apart. N steps is
    right, "or a batch" makes it N / B, rounded up. In sgd-unbiased σ² is the variance of single
    samples' gradients; the check lists all batches of 1, 2, 3 out of 6. One report calls
    sgd-below-gd false: there is only one batch of all samples. The gradients of parts add up. One
    report states "decrease" for batch-doubling. First noise is the limit, then curvature."""
    one, many = (len(torch.arange(1000).split(b)) for b in (1, 64))
    yield refuted("sgd-steps", "SGD makes one step per sample in every epoch, \"using only one "
                  "sample or a batch\".", "1000, 1000 steps", f"{one}, {many} steps (B = 1, 64)",
                  (one, many) == (1000, 16))
    def of_all_batches(per_sample, b, replace):  # their mean gradients [number of batches, d]
        n = range(len(per_sample))
        chosen = itertools.product(n, repeat=b) if replace else itertools.combinations(n, b)
        return torch.stack([per_sample[list(batch)].mean(dim=0) for batch in chosen])
    x, y, w = normal(6, 3), normal(6), normal(3)
    per_sample = torch.stack([gradient(lambda w: (xi @ w - yi) ** 2, w) for xi, yi in zip(x, y)])
    full = gradient(lambda w: ((x @ w - y) ** 2).mean(), w)
    variance, pairs = per_sample.var(dim=0, correction=0), []
    for b, replace in itertools.product((1, 2, 3), (True, False)):
        found = of_all_batches(per_sample, b, replace)
        pairs += [(found.mean(dim=0), full), (found.var(dim=0, correction=0),
                                              variance / b * (1 if replace else (6 - b) / 5))]
    yield holds("sgd-unbiased", "The mini-batch gradient is unbiased; its variance is σ²/B, times "
                "(N - B)/(N - 1) if sampled without replacement.", *equal(*pairs))
    per_sample = normal(6, 3)  # random vectors instead of gradients: the values do not matter
    sgd, gd = (of_all_batches(per_sample, b, False).var(dim=0, correction=0).sum().item()
               for b in (2, 6))
    yield refuted("sgd-below-gd", "SGD's gradient has less variance than the full gradient.",
                  "SGD < GD", f"{sgd:.3f} > {gd:.3f}", sgd > gd == 0)
    x, y, w = normal(60, 3), normal(60), normal(3)
    of_part = lambda x, y: gradient(lambda w: ((x @ w - y) ** 2).mean(), w)
    parts = list(zip(x.split(16), y.split(16)))
    in_parts = sum(len(part) / 60 * of_part(part, target) for part, target in parts)
    most, difference = len(parts[0][0]), (in_parts - of_part(x, y)).abs().max().item()
    yield refuted("gd-memory", "Full gradient descent needs all samples in memory at once.",
                  "60 samples at once", f"{most} (difference {difference:.0e})",
                  most < 60 and difference <= ROUNDING)
    # y = x.w* + noise of standard deviation 0.5, x has 10 values with variances 1 to 0.1; the loss,
    # less its minimum, is the mean of 200 runs for each learning rate
    def steps_to(batch, target=0.01, limit=2000):
        variance = torch.logspace(0, -1, 10, dtype=torch.float64)  # [10]
        lrs = double([0.02 * 1.3 ** i for i in range(16)])[:, None, None]
        error = torch.ones(16, 200, 10, dtype=torch.float64)       # w - w*: [lrs, runs, 10]
        for step in range(1, limit + 1):
            x = normal(200, batch, 10) * variance.sqrt()           # [runs, batch, 10]
            residual = torch.einsum("sbd,rsd->rsb", x, error) - 0.5 * normal(200, batch)
            error -= lrs * torch.einsum("rsb,sbd->rsd", residual, x) / batch
            if ((error ** 2 * variance).sum(dim=2).mean(dim=1) / 2).min() <= target:
                return step
    a, b, c, d = (steps_to(batch) for batch in (4, 8, 128, 256))
    yield holds("batch-doubling", "Twice the batch: fewer steps, half as many if noise is large.",
                "fewer, ratio 0.5 -> 1", f"4, 8: {a}, {b} steps; 128, 256: {c}, {d}",
                a > b > c >= d and 0.4 < b / a < 0.6 and d / c > 0.7)


@theme
def where_descent_ends():
    """One report calls gd-global false: (x² - 1)² + 0.3 x has its lower well on the left, and
    descent from 1.5 ends on the right. Noise can help, but guarantees nothing. One report asks
    where gradient descent cannot be used: where there is no finite data set, as for the expectation
    over z: every step of a GAN or a VAE is one of SGD. Neither helps if the loss is flat between
    jumps, like the share of wrong answers. One report states newton-ravine, because Newton's steps
    cost more and can end in saddle points. True: with d weights one costs d³/3 products, so
    momentum is faster if d is large. But in a quadratic ravine Newton needs one step, and momentum
    at its best (Polyak 1964) a little more than √κ / 2 log(1/ε), κ the ratio of curvatures."""
    f = lambda x: (x ** 2 - 1) ** 2 + 0.3 * x
    def ends(noise, runs):
        x = torch.full((runs,), 1.5, dtype=torch.float64)
        for _ in range(300):
            x = x - 0.02 * (gradient(lambda x: f(x).sum(), x) + noise * normal(runs))
        return x
    x, lower = ends(0, 1).item(), f(-1.0)
    escaped = (ends(10, 1000) < 0).double().mean().item()
    yield refuted("gd-global", "Gradient descent reaches the global minimum, SGD a local one.",
                  f"{lower:g} or lower", f"{f(x):.3g}, at x = {x:.2f} (with noise: {escaped:.0%} "
                  "left)", f(x) > lower + 0.1 and escaped > 0.3)
    x, w = normal(100, 3), normal(3)
    y = (x @ w).sign()  # right answers 1 and -1
    wrong = lambda w: (1 - y * (x @ w).sign()) / 2  # of each sample
    flat, smooth = (gradient(lambda w: loss(w).mean(), -w).norm().item()
                    for loss in (wrong, lambda w: F.softplus(-y * (x @ w))))
    single = max(gradient(lambda w: wrong(w)[i], -w).norm().item() for i in range(100))
    share = wrong(-w).mean().item()
    yield refuted("gd-no-slope", "Gradient descent, or SGD, can minimise any loss.", "a gradient",
                  f"{share:.0%} wrong, gradient {flat:g}, SGD's {single:g} (cross-entropy: "
                  f"{smooth:.2f})", share == 1 and flat == single == 0 and smooth > 0.01)
    newton = lambda h, x: x - torch.linalg.solve(torch.diag(h), h * x)
    h, start = double([1.0, 1000.0]), double([1.0, 1.0])  # f = Σ h x² / 2
    low, high = h.sqrt()
    x, v, steps = start, 0 * start, 0
    while x.norm() > 1e-6:
        v = ((high - low) / (high + low)) ** 2 * v - 4 / (high + low) ** 2 * h * x
        x, steps = x + v, steps + 1
    saddle, near = double([1.0, -1.0]), double([1.0, 1e-3])
    stuck = newton(saddle, near).norm().item()
    away = ((1 - 0.1 * saddle) ** 100 * near).norm().item()  # 100 steps, learning rate 0.1
    yield refuted("newton-ravine", "Momentum beats Newton in a narrow ravine.",
                  "momentum in fewer steps", f"momentum {steps}, Newton 1 (saddle: Newton "
                  f"{stuck:g}, descent {away:.0f} away)", steps > 1 and stuck <= 1e-6
                  and newton(h, start).norm().item() <= 1e-6 and away > 10)


def ridge(x, y, lam):
    """argmin_w ‖x w - y‖² + λ ‖w‖² = (xᵀx + λI)⁻¹ xᵀy, [d], for x [n, d], y [n] and λ > 0."""
    return torch.linalg.solve(x.T @ x + lam * torch.eye(x.shape[1]).to(x), x.T @ y)


def rnn(inputs, w_x, w_h, truncate=None):
    """States h_t = tanh(W_x x_t + W_h h_{t-1}), h_{-1} = 0, t = 0..T-1; returns the last one, [H].
    inputs [T, d], w_x [H, d], w_h [H, H]. truncate = S, 1 to T: the last state's gradient flows
    through the last S steps only, and is 0 for all inputs before them. The state stays the same,
    unlike that of a sequence cut to its last S inputs. Raises ValueError for any other S."""
    if truncate is not None and not 1 <= truncate <= len(inputs):
        raise ValueError(f"truncate = {truncate}: must be from 1 to {len(inputs)}")
    h = torch.zeros(len(w_h)).to(inputs)
    for t, x in enumerate(inputs):
        if truncate is not None and t == len(inputs) - truncate:
            h = h.detach()
        h = torch.tanh(w_x @ x + w_h @ h)
    return h


@theme
def inner_loops():
    """One report asks whether the inner problem of a bilevel problem needs gradient descent. Here
    the outer one is the best λ of ridge regression for held-out data; the inner one, its weights w,
    has a closed form, and dw/dλ = -(xᵀx + λI)⁻¹ w. So the outer gradient is exact. tbptt-reach is
    right for the gradient and wrong for the state: with W_h = I and small values the network
    remembers, and its last state moves with an input 12 steps back."""
    x, y, held_x, held_y, lam = normal(20, 4), normal(20), normal(10, 4), normal(10), double(0.7)
    w = ridge(x, y, lam)
    inner = gradient(lambda w: ((x @ w - y) ** 2).sum() + lam * (w ** 2).sum(), w).norm()
    dw = -torch.linalg.solve(x.T @ x + lam * torch.eye(4).to(x), w)
    exact = 2 * (held_x @ w - held_y) @ (held_x @ dw)
    measured = gradient(lambda lam: ((held_x @ ridge(x, y, lam) - held_y) ** 2).sum(), lam)
    error = abs((exact - measured) / exact).item()
    yield refuted("bilevel", "The inner problem of a bilevel problem needs gradient descent.",
                  "no exact gradient otherwise", f"exact: relative error {error:.0e}",
                  (inner <= ROUNDING * (x.T @ y).norm()).item() and error <= 1e-5)
    x, w_x, w_h, s = normal(12, 3), normal(4, 3), normal(4, 4) / 2, 5
    full, cut = (gradient(lambda x: rnn(x, w_x, w_h, truncate).sum(), x) for truncate in (None, s))
    yield holds("tbptt", "Truncating backpropagation through time cuts the gradient, nothing else.",
                *equal((rnn(x, w_x, w_h), rnn(x, w_x, w_h, s)), (cut[-s:], full[-s:]),
                       (cut[:-s], 0), and_also=(full[:-s] != 0).any()))
    x, w_x, w_h = normal(12, 3) / 10, normal(8, 3) / 20, torch.eye(8, dtype=torch.float64)
    other = torch.cat([x[:1] + 1, x[1:]])
    first, last = ((rnn(other[:n], w_x, w_h, min(n, s)) - rnn(x[:n], w_x, w_h, min(n, s))).norm()
                   .item() for n in (1, 12))
    at_first = gradient(lambda x: rnn(x, w_x, w_h, s).sum(), x)[0].norm().item()
    yield refuted("tbptt-reach", "With truncation at S steps a network cannot use longer "
                  "relations.", "state moves by 0", f"by {last:.2g} (first state: {first:.2g}; "
                  f"gradient {at_first:g})", last > 0.5 * first > 0.01 and at_first == 0)


@theme
def never_zeroed():
    """One report sees its loss "exploding exponentially" with gradients that were never zeroed. The
    loss compares the means of z, z² and z⁴ of a batch of codes with those of noise. Each step uses
    the sum of gradients so far, which Adam scales to full length. In plain descent this is momentum
    with factor 1. It explodes with z⁴, whose curvature grows until learning rate times curvature
    passes 4. The learning rate is the largest 0.01 / 2^i that works with zeroed gradients."""
    def losses(optimiser, lr, zeroed, powers=(1, 2, 4)):
        with torch.random.fork_rng(devices=[]):  # the same data, weights and noise each time
            x, w = 2 * torch.rand(256, 8).double(), torch.randn(8, 4).double() / 8 ** 0.5
            w, b = w.requires_grad_(), torch.zeros(4).double().requires_grad_()
            opt, seen = optimiser([w, b], lr=lr), []
            for _ in range(300):
                z, noise = x @ w + b, normal(256, 4)
                loss = sum(((z ** k).mean(0) - (noise ** k).mean(0)).pow(2).mean() for k in powers)
                if zeroed:
                    opt.zero_grad()
                loss.backward()
                opt.step()
                seen.append(loss.item())
        return double(seen).nan_to_num(math.inf)
    zeroed, summed = (losses(torch.optim.Adam, 0.01, zero) for zero in (True, False))
    first, early, late = (part.max().item() for part in (summed[0], summed[:150], summed[150:]))
    yield holds("grad-accumulate", "With Adam, gradients that are never zeroed make this loss "
                "explode.", "explodes", f"{first:.2g}, {early:.0e}, {late:.0e} (zeroed: "
                f"{zeroed[-1]:.2g})", late > max(1e5, 10 * early) and zeroed[-1].item() < 10)
    sgd, lrs = torch.optim.SGD, [0.01 / 2 ** i for i in range(10)]
    lr = next(lr for lr in lrs if losses(sgd, lr, True)[-1].isfinite())
    fourth, without = losses(sgd, lr, False).max().item(), losses(sgd, lr, False, (1, 2))
    yield refuted("grad-accumulate-sgd", "Plain gradient descent without zeroing makes any loss "
                  "explode.", "explodes", f"with z⁴ {fourth:.2g}, without {without.max():.2g}",
                  without.max().item() <= 2 * without[0].item() and fourth > 1e12)


# A variable with these three values and probabilities has a normal's first five moments, so E f
# is a sum of few terms, and the same as a normal's for polynomials f up to order five.
THREE_POINTS = (-3 ** 0.5, 0.0, 3 ** 0.5)
THREE_WEIGHTS = (1 / 6, 2 / 3, 1 / 6)


def noise_parts(loss, D, x):
    """½ L'' ‖∇D‖² and ½ L' ΔD at x [B, d], [B] each: E L(D(x + s e)) = L(D(x)) + s² (their sum) +
    O(s⁴) for noise e of mean 0, covariance I and no third moments. ΔD = Σ_i ∂²D/∂x_i².
    loss: scalar -> scalar; D: [d] -> scalar; both smooth."""
    d = vmap(D)(x)
    grad, hessian = vmap(jacrev(D))(x), vmap(jacrev(jacrev(D)))(x)
    first, second = vmap(jacrev(loss))(d), vmap(jacrev(jacrev(loss)))(d)
    laplacian = hessian.diagonal(dim1=1, dim2=2).sum(dim=1)
    return second * grad.pow(2).sum(dim=1) / 2, first * laplacian / 2


@theme
def noise_on_the_input():
    """One report quotes grad-norm-noise. To order s² noise adds s²/2 (L'' ‖∇D‖² + L' ΔD), and only
    the first part is a penalty. The second makes noise *lower* L = -log σ(D), the loss of real
    pictures alone, at many of 100 points, and a squared error with random targets as well. What
    decides is whether L' averages to 0 over the labels at x: it does for a squared error at its
    minimum (Bishop 1995) and for a GAN's whole loss if D is best for the shares of real and fake at
    x (Roth et al. 2017, arXiv:1705.09367). Then only the penalty is left, and the ratio is 1."""
    w, v, x = normal(5, 2), normal(5), normal(100, 2)
    D, real = lambda x: torch.tanh(x @ w.T) @ v, lambda d: F.softplus(-d)
    e = double(list(itertools.product(THREE_POINTS, repeat=2)))  # [9, 2], for s = 1
    probability = double(list(itertools.product(THREE_WEIGHTS, repeat=2))).prod(dim=1)
    share, target = torch.sigmoid(D(x))[:, None], normal(100, 1)  # of reals, for which D is best
    added = lambda loss, s=0.002: (  # [100]
        loss(D(x[:, None] + s * e)) @ probability - loss(D(x)[:, None])[:, 0])
    penalty, rest = noise_parts(real, D, x)
    coarse, fine = ((added(real, s) - s ** 2 * (penalty + rest)).abs().sum().item()
                    for s in (0.004, 0.002))
    alone, squares, best = (added(loss) for loss in (
        real, lambda d: (d - target) ** 2, lambda d: share * real(d) + (1 - share) * real(-d)))
    lower = [(change < 0).sum().item() for change in (alone, squares, best)]
    ratio = (best.sum() / 0.002 ** 2 / penalty.sum()).item()  # L'' is the same for both labels
    yield refuted("grad-norm-noise", "Noise of variance s² on D's input is a gradient penalty.",
                  "loss lower at 0 of 100", "at {} (squared error: {}; D at its best: {}, ratio "
                  "{:.4f})".format(*lower, ratio), min(lower[:2]) > 10 and lower[2] == 0
                  and abs(coarse - 16 * fine) <= fine and abs(ratio - 1) < 1e-3)


# --- flows and autoencoders --------------------------------------------------------------------

TOPICS["flows and autoencoders"] = """Three methods give each picture x a code z. A flow maps codes
    to pictures by an invertible function. GLO learns one free code for each picture. A variational
    autoencoder (VAE) learns q(z given x), a distribution of codes. Which codes can be sampled?"""


def coupling_log_prob(x, layers):
    """log p(x) = log N(z; 0, I) + log |det ∂z/∂x|, z = M⁻¹(x), in nats, for x [B, d]: [B].
    layers of M from z to x: (mask, scale, shift), mask a 0/1 tensor [d], scale and shift functions
    [B, d] -> [B, d] of the coordinates that the mask lets through (Dinh et al. 2017, section 3):
    x = mask z + (1 - mask)(z exp(scale(mask z)) + shift(mask z)),
    log |det ∂z/∂x| = -Σ (1 - mask) scale(mask x) over all layers. ValueError for another mask."""
    log_det = 0
    for mask, scale, shift in reversed(layers):  # one layer back: from x towards z
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"a mask has 0 and 1 only, not {mask.tolist()}")
        unmasked = mask * x
        s = (1 - mask) * scale(unmasked)
        x = unmasked + (1 - mask) * (x - shift(unmasked)) * (-s).exp()
        log_det = log_det - s.sum(dim=1)
    return log_det - (x ** 2).sum(dim=1) / 2 - x.shape[1] / 2 * math.log(2 * math.pi)


def random_coupling(d, depth):
    """Coupling layers with one-layer tanh nets; the mask has even and odd coordinates in turn."""
    def net():
        w, b = normal(d, d) / d ** 0.5, 0.5 * normal(d)
        return lambda x: torch.tanh(x @ w.T + b) / 2
    return [((torch.arange(d) + i) % 2, net(), net()) for i in range(depth)]


def kl_standard_normal(mu, sigma):
    """KL(N(mu, Σ) ‖ N(0, I)) = (tr Σ + ‖mu‖² - d - log det Σ) / 2, nats; mu [d], sigma [d, d].
    KL(q ‖ p) is E_q (log q - log p). tr, the trace, is the sum of the diagonal."""
    return (sigma.trace() + mu @ mu - len(mu) - torch.logdet(sigma)) / 2


def log_normal(x, mu, sigma):
    """log N(x; mu, Σ), nats; x, mu [d], sigma [d, d]."""
    d = x - mu
    return -(d @ torch.linalg.solve(sigma, d) + torch.logdet(2 * math.pi * sigma)) / 2


def random_covariance(d):
    """A random symmetric matrix with eigenvalues of 0.1 and more."""
    a = normal(d, d)
    return a @ a.T / d + 0.1 * torch.eye(d).to(a)


def linear_elbo(x, w, v, mu, cov):
    """E_q log p(x given z) - KL(q ‖ p(z)) in closed form, q = N(mu, Σ): the ELBO, nats.
    The linear VAE: p(z) = N(0, I), p(x given z) = N(w z, v I), w [n, d]; x [n], mu [d]."""
    fit = ((x - w @ mu) ** 2).sum() + (w @ cov @ w.T).trace()  # E_q ‖x - w z‖²
    return -(fit / v + len(x) * math.log(2 * math.pi * v)) / 2 - kl_standard_normal(mu, cov)


def best_linear_vae(variance, v, pixels=1):
    """The ‖w‖ >= 0 of the largest mean ELBO for data x of mean 0, and KL(q ‖ prior) there.
    All pixels are equal, each has that variance, so pixels · variance is the largest eigenvalue of
    the covariance. One code, p(x given z) = N(w z, v I), and q is the true posterior. The ELBO is
    quadratic in x, so the mean over x = ±√variance is exact. ‖w‖: the best of 0, 0.05, ..., 3."""
    x, found = torch.full((pixels,), variance ** 0.5, dtype=torch.float64), []
    for size in torch.linspace(0, 3, 61, dtype=torch.float64):
        w = size * F.normalize(torch.ones_like(x), dim=0)[:, None]
        cov = v / (v + size ** 2).reshape(1, 1)
        mu = cov @ w.T @ x / v
        elbo = linear_elbo(x, w, v, mu, cov).item()
        found.append((elbo, size.item(), kl_standard_normal(mu, cov).item()))
    return max(found)[1:]


@theme
def codes():
    """M is four coupling layers in the plane; p must sum to 1. Nothing ties GLO's codes to a
    distribution (Bojanowski et al. 2018 fit one later): only the training pictures, here from a
    ring of 8 modes, have codes. The check counts points within 3 standard deviations of a mode."""
    line = torch.linspace(-20, 20, 401, dtype=torch.float64)
    p = coupling_log_prob(torch.cartesian_prod(line, line), random_coupling(2, 4)).exp()
    yield holds("change-of-variables", "log p(x) = log p_z(M⁻¹(x)) + log |det ∂M⁻¹/∂x|.",
                *agree(1, p.sum().item() * 0.1 ** 2, "in all", 1e-6))
    angle = 2 * math.pi * torch.arange(8) / 8
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    x = centres[torch.randint(8, (512,))] + 0.05 * torch.randn(512, 2)
    G = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    free = torch.randn(512, 2, requires_grad=True)
    opt = torch.optim.Adam([{"params": [free], "lr": 1e-2}, {"params": G.parameters(), "lr": 3e-3}])
    for _ in range(400):
        loss = (G(free) - x).pow(2).sum(dim=1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    own, sampled = ((torch.cdist(G(z), centres).min(dim=1).values < 0.15).float().mean().item()
                    for z in (free, torch.randn(4000, 2)))
    yield holds("glo-no-prior", "In GLO, which learns a code for each picture, G(z) of a normal z "
                "is no sample.", "far apart", f"learned codes {own:.0%}, normal z {sampled:.0%}",
                own > 0.8 and sampled < 0.3)


@theme
def vae():
    """log p(x) - ELBO = KL(q ‖ p(z given x)) (Kingma, Welling 2014). A maximal mean of log p(x),
    the evidence, is a minimal KL(data ‖ model). One report asks vae-posterior: N(0, I) is the prior
    of z, before x is seen, and z is sampled. In no-density G's pictures form a surface. With noise
    s, the log density on it rises by log 10 for each missing dimension when s falls tenfold; off
    it, it falls to -∞. One report leaves out the 1/2 of kl-closed-form. An encoder returns log σ²,
    which may be negative. In posterior collapse q is the prior for every x. In a linear VAE with
    one code the best ‖w‖² is λ - v, or 0 if λ < v, λ the largest eigenvalue of the data's
    covariance (Lucas et al. 2019), and the KL log(λ/v)/2. A smaller v (01: x_sigma2) is a cure."""
    w, v = normal(5, 2), 0.3
    x = w @ normal(2) + v ** 0.5 * normal(5)
    cov = torch.linalg.inv(torch.eye(2).to(w) + w.T @ w / v)  # of the true posterior of z
    mu = cov @ w.T @ x / v
    log_p = lambda x, v: log_normal(x, 0 * x, w @ w.T + v * torch.eye(5).to(w)).item()
    at_best = log_p(x, v) - linear_elbo(x, w, v, mu, cov).item()
    gaps = [log_p(x, v) - linear_elbo(x, w, v, mu + normal(2), random_covariance(2)).item()
            for _ in range(100)]
    yield holds("vae-elbo", "A VAE minimises a bound above -log p(x), reached at the posterior.",
                "gap > 0; 0 at posterior", f"{min(gaps):.2f} to {max(gaps):.0f}; "
                f"{at_best:.0e}", all(gap > 0 for gap in gaps) and abs(at_best) < ROUNDING)
    one, two = (w @ (mu + torch.linalg.cholesky(cov) @ normal(2)) for _ in range(2))
    kl, apart = kl_standard_normal(mu, cov).item(), (one - two).norm().item()
    yield refuted("vae-posterior", "q(z given x) is N(0, I); x encoded twice gives one picture.",
                  "KL 0, pictures 0 apart", f"KL {kl:.2f} nats, {apart:.2f} apart",
                  kl > ROUNDING and apart > ROUNDING)
    on = w @ normal(2)
    (before, there), (_, off) = ([log_p(x, s ** 2) for s in (1e-3, 1e-4)]
                                 for x in (on, on + 0.1 * normal(5)))
    yield holds("no-density", "If z is shorter than x, the pictures G(z) have no density p(x).",
                "(5 - 2) log 10 = 6.908 a step", f"{there - before:.3f} on the surface (off it: "
                f"{off:.0e})", abs(there - before - 3 * math.log(10)) < 1e-3 and off < -1e4)
    mean, cov = normal(3), random_covariance(3)
    steps = 3 ** 0.5 * torch.linalg.cholesky(cov).T  # row i is √d L_i
    average = sum(log_normal(z, mean, cov) - log_normal(z, 0 * mean, torch.eye(3).double())
                  for z in torch.cat([mean + steps, mean - steps])) / 6
    yield holds("kl-closed-form", "KL(N(mu, Σ) ‖ N(0, I)) = (tr Σ + ‖mu‖² - d - log det Σ) / 2.",
                *agree(average.item(), kl_standard_normal(mean, cov).item(), "nats"))
    (w, kl), (w_collapsed, kl_collapsed), (w_two, _) = (
        best_linear_vae(*data) for data in ((1.0, 0.36), (1.0, 1.5), (0.6, 1.0, 2)))
    yield holds("posterior-collapse", "If a linear VAE's decoder expects more noise v than the "
                "largest eigenvalue of the data's covariance, its code says nothing.",
                "0.5108; 0 for v > λ", f"{kl:.4f}; {kl_collapsed:.2g} nats (two pixels of 0.6, v = "
                f"1: ‖w‖ {w_two:.2f})", abs(w - 0.8) < 1e-9 and w_collapsed == 0
                and abs(kl - math.log(1 / 0.36) / 2) < ROUNDING and abs(kl_collapsed) < ROUNDING
                and abs(w_two - 0.2 ** 0.5) < 0.05)


@theme
def blur():
    """Squared error and cross-entropy are convex, with gradient 0 at the mean. A picture that fits
    the code has on average twice the squared error. A GAN avoids the mean: D sees that it is not
    among the data. In shift-blind the pictures are lines that wander down a square."""
    x = torch.rand(5, 784, dtype=torch.float64)  # five pictures that fit one code
    mean, error = x.mean(dim=0), lambda answer: (x - answer).pow(2).sum(dim=1).mean()
    size = max(gradient(f, mean).abs().max().item() for f in (
        error, lambda a: F.binary_cross_entropy(a.expand(5, -1), x)))
    errors = [error(one).item() for one in (mean, *x)]
    yield holds("vae-mean", "If several pictures fit one code, a VAE's best answer is their mean.",
                *agree(2, sum(errors[1:]) / 5 / errors[0], "times the error",
                       note=f"gradient {size:.0e}", and_also=size < ROUNDING))
    place = torch.randint(11, 16, (100, 1)) + torch.randint(-1, 2, (100, 20)).cumsum(dim=1)
    x = F.one_hot(place.clamp(1, 26), 28).double()  # [100, 20, 28]
    moved, mean = ((x - other).pow(2).sum(dim=(1, 2)) for other in (x.roll(1, 2), x.mean(dim=0)))
    yield holds("shift-blind", "By squared error a line moved by a pixel is farther away than the "
                "mean of all pictures.", "100 of 100", f"{(moved > mean).sum()} of 100: "
                f"{moved.mean():.0f} (mean {mean.mean():.0f})", (moved > mean).all().item())


# --- GANs --------------------------------------------------------------------------------------

TOPICS["GANs"] = """A GAN is a game: the generator G turns noise z into pictures, the discriminator
    D answers how likely a picture is real: σ(a), where a is its logit. p is the distribution of the
    data, q that of G's pictures. What does a perfect D measure, and how does the game move?"""


def x_log_y(x, y):
    """x log y; where x is 0, it and its gradients are 0, even for y = 0 (xlogy's are nan there)."""
    some = x > 0
    return torch.where(some, x, 0) * torch.where(some, y, 1).log()


def jensen_shannon(p, q):
    """JSD = KL(p ‖ m)/2 + KL(q ‖ m)/2, m = (p + q)/2; nats, 0 to log 2; p, q [n] sum to 1.
    Where p or q is 0, its term and its gradient are 0. ValueError if the shapes differ."""
    if p.shape != q.shape:
        raise ValueError(f"p {tuple(p.shape)} and q {tuple(q.shape)} differ")
    m = (p + q) / 2
    return (x_log_y(p, p) + x_log_y(q, q) - x_log_y(2 * m, m)).sum() / 2


def gan_value(D, p, q):
    """V(D) = E_p log D + E_q log(1 - D), D, p, q [n] (Goodfellow et al. 2014, eq. 1); nats.
    Where p or q is 0, its term and its gradient are 0. Raises ValueError if the shapes differ."""
    if not D.shape == p.shape == q.shape:
        raise ValueError(f"D {tuple(D.shape)}, p {tuple(p.shape)} and q {tuple(q.shape)} differ")
    return (x_log_y(p, D) + x_log_y(q, 1 - D)).sum()


@theme
def best_d():
    """V is concave in D, so D* is best if the gradient vanishes there (Goodfellow et al. 2014). One
    report asks whether perfect-d is true. At p = q the best D is 1/2 everywhere and gives G no
    gradient. But a weak D is right on 50 % as well, and if p ≠ q, training both improves G: here D
    is 1/2 at first, then the best one in each of 200 steps of G. One report asks detach-d. D's
    gradient is the same with G(z).detach(); G's comes through D, so there G(z) needs its graph."""
    p, q = normal(6).softmax(0), normal(6).softmax(0)
    best = p / (p + q)
    yield holds("optimal-d", "D* = p / (p + q) maximises V, and V(D*) = 2 JSD(p, q) - log 4.",
                *equal((gan_value(best, p, q), 2 * jensen_shannon(p, q) - math.log(4)),
                       (gradient(lambda D: gan_value(D, p, q), best), 0)))
    logits, other = normal(6), normal(6)  # the logits of q stand for G's weights
    grad_g = lambda logits, p: gradient(  # with the best D
        lambda a: gan_value(p / (p + logits.softmax(0)), p, a.softmax(0)), logits)
    p, trained = other.softmax(0), logits
    for _ in range(200):
        trained = trained - 5 * grad_g(trained, p)
    at_balance = grad_g(logits, logits.softmax(0)).norm().item()
    before, after = (jensen_shannon(p, q.softmax(0)).item() for q in (logits, trained))
    yield refuted("perfect-d", "If D is right on 50 %, training G further improves the pictures.",
                  "improves", f"p = q: gradient {at_balance:.0e} (p ≠ q, weak D: JSD {before:.2f} "
                  f"to {after:.0e})", at_balance <= ROUNDING and after < 0.01 * before)
    G, D, z = nn.Linear(3, 2).double(), nn.Linear(2, 1).double(), normal(8, 3)
    grads = lambda x_fake: torch.autograd.grad(  # of D's weights and, if the graph has them, of G's
        F.softplus(D(x_fake)).mean(), [D.weight, G.weight], allow_unused=True)
    (whole, whole_g), (detached, detached_g) = grads(G(z)), grads(G(z).detach())
    difference = (whole - detached).abs().max().item()
    yield refuted("detach-d", "Training D needs backpropagation into G.", "another gradient",
                  f"difference {difference:g} (G's {whole_g.norm():.2f}, then {detached_g})",
                  difference == 0 and detached_g is None and whole_g.norm().item() > 0)


@theme
def saturation():
    """In the logit a the gradients are -σ(a) and -(1 - σ(a)). One report states -∞ for D(G(z)) ->
    1. That is -1/(1 - D), in D's output, but G is trained through a, and the sigmoid's derivative D
    (1 - D) takes the factor away. One report states that with a squared error G's gradient
    vanishes, another that this loss is good. Both are right: on a sigmoid it is 2 (σ - 1) σ (1 -
    σ), on raw scores 2 (a - 1) (LSGAN, Mao et al. 2017). Maximising σ² is another loss, with -2 σ²
    (1 - σ). In log-plus-eps G's gradient is -σ (1 - σ) / (σ + 1e-8)."""
    at = lambda a, loss: gradient(loss, double(a)).item()
    minimax, D = lambda a: F.logsigmoid(-a), 1 / (1 + math.exp(20))
    low, nonsaturating = at(-20.0, minimax), at(-20.0, lambda a: -F.logsigmoid(a))
    yield holds("saturation-low", "As D(G(z)) -> 0 the minimax generator's gradient vanishes, the "
                "non-saturating one does not.", f"{-D:.0e}, {-(1 - D):.4f}",
                f"{low:.0e}, {nonsaturating:.4f}",
                abs(low + D) < 1e-15 and abs(nonsaturating + 1 - D) < ROUNDING)
    in_logit, in_output = at(20.0, minimax), at(1 - D, lambda D: (1 - D).log())
    yield refuted("saturation-high", "As D(G(z)) -> 1 the minimax gradient explodes to -∞.", "-∞",
                  f"{in_logit:.4f} in the logit ({in_output:.0e} in D)",
                  abs(in_logit + 1) < 1e-8 and in_output < -1e8)
    sigmoid, raw, square = (at(-10.0, loss) for loss in (
        lambda a: (a.sigmoid() - 1) ** 2, lambda a: (a - 1) ** 2, lambda a: -a.sigmoid() ** 2))
    yield holds("mse-sigmoid", "Squared error: G's gradient vanishes on a sigmoid, not on scores.",
                "-9e-05, -22", f"{sigmoid:.0e}, {raw:g} (-D²: {square:.0e})",
                -1e-4 < sigmoid < -1e-8 < square < 0 and raw == -22)
    plus = [at(a, lambda a: -(torch.sigmoid(a) + 1e-8).log()) for a in (-10.0, -20.0, -30.0)]
    yield holds("log-plus-eps", "-log(D + 1e-8) saturates again, at the logits -10, -20, -30.",
                *exactly("-1.00, -0.17, -9e-06", "{:.2f}, {:.2f}, {:.0e}".format(*plus)))


def smoothed_d(p, q, real=0.9, fake=0.0):
    """D* = (real p + fake q) / (p + q): the best D for those labels of real and fake; p, q [n]."""
    return (real * p + fake * q) / (p + q)


@theme
def smoothing():
    """One report calls the floor "an asymptotic bound"; its log shows 0.3253. The cross-entropy of
    a label y is H(y) + KL(y ‖ D), the fakes' part is >= 0. Why only real labels? With β = 0, D* is
    only scaled; with β > 0 it is about β and flat where p is small compared with q, and does not
    lead G to p (Salimans et al. 2016), as log D* shows for p = N(0, 1), q = N(6, 1) at x = 6."""
    a = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    lowest = F.binary_cross_entropy_with_logits(a, torch.full_like(a, 0.9), reduction="none").min()
    yield holds("smoothing-floor", "With real label 0.9 D's loss is at least H(0.9) = 0.3251.",
                *agree(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), lowest.item(), "nats", 1e-8))
    p, q = normal(6).softmax(0), normal(6).softmax(0)
    pairs, at_6 = [], []
    for real, fake in ((0.9, 0.0), (0.9, 0.1)):
        loss = lambda D: -(p @ (real * D.log() + (1 - real) * (1 - D).log())
                           + q @ (fake * D.log() + (1 - fake) * (1 - D).log()))
        log_d = lambda x: smoothed_d(*((-(x - mean) ** 2 / 2).exp() for mean in (0, 6)), real,
                                     fake).log()
        pairs.append((gradient(loss, smoothed_d(p, q, real, fake)), 0))
        at_6.append(gradient(log_d, double(6.0)).item())
    yield holds("smoothing-optimum", "With real label α, fake label β the best D is (α p + β q) / "
                "(p + q), flat where p is small compared with q if β > 0.", *equal(
                    *pairs, note="at x = 6: {:.1f} for β = 0, {:.0e} for 0.1".format(*at_6),
                    and_also=abs(at_6[0] + 6) < 1e-3 and -1e-6 < at_6[1] < -1e-7))


@theme
def reading_a_log():
    """One report asks when to stop. Let q = p, so that nothing is left to learn, and D = σ(b). If D
    drifts from b = 0 to 0.3, Loss_D changes by 2 %, as its gradient is 0, and Loss_G = -log D by 20
    %, with the same G. For each fake D's loss is -log(1 - D), which makes the curves look like
    mirror images. At balance Loss_G is log 2 and Loss_D, a sum of two, 2 log 2; with a higher
    Loss_D, D is worse than guessing. If it says "real" to all, as b = 2 here, Loss_G is low and
    Loss_D high. One report shows the log of double-sigmoid, and one report asks why the losses are
    constant; the cause is our conclusion, because all digits agree. D ends in a sigmoid, 1 on reals
    and 0 on fakes, and the loss applies another. The first lets no gradient through."""
    losses = lambda b: (F.softplus(-b) + F.softplus(b), F.softplus(-b))  # of D (both parts), of G
    of_d, of_g = (gradient(lambda b: losses(b)[i], double(0.0)).item() for i in range(2))
    (before_d, before), (after_d, after), (high_d, low) = (
        [loss.item() for loss in losses(double(b))] for b in (0.0, 0.3, 2.0))
    yield refuted("g-loss-alone", "While D's loss stays and G's falls, G gets better; stop at G's "
                  "lowest loss.", "G better", f"same G, Loss_G {before:.3f} to {after:.3f} (Loss_D "
                  f"{before_d:.2f} to {after_d:.2f})", after < 0.81 * before
                  and abs(after_d / before_d - 1) < 0.02 and (of_d, of_g) == (0, -0.5))
    yield refuted("g-low-d-high", "Ideally G's loss is low and D's loss is high.", "low, high",
                  f"balance: {before:.3f}, {before_d:.3f} (D says real to all: {low:.3f}, "
                  f"{high_d:.3f})", low < before and high_d > before_d)
    a = 5 * normal(100)
    yield holds("loss-symmetry", "exp(-Loss_G) + exp(-loss of D on the fake) = 1 for each fake.",
                *equal(((-F.softplus(-a)).exp() + (-F.softplus(a)).exp(), 1)))
    def twice(a):  # a: the logit on reals, -a: on fakes
        real, fake = torch.sigmoid(a), torch.sigmoid(-a)
        return F.softplus(-real) + F.softplus(fake), F.softplus(-fake)
    a = double(40.0)
    loss_d, loss_g = (loss.item() for loss in twice(a))
    of_d, of_g = (gradient(lambda a: twice(a)[i], a).item() for i in range(2))
    text = f"{loss_d:.4f}, {loss_g:.4f}"
    yield holds("double-sigmoid", "A sigmoid applied twice and D saturated freeze the log at "
                "Loss_D 1.0064, Loss_G 0.6931.", "1.0064, 0.6931", f"{text} (gradients {of_d:.0e}, "
                f"{of_g:.0e})", text == "1.0064, 0.6931" and abs(of_d) + abs(of_g) < 1e-12)


@figure("fingerprints", "Two constants in the log of a GAN", 1, 2)
def plot_fingerprints(smoothing, twice):
    a = torch.linspace(-6, 8, 300, dtype=torch.float64)
    for label in (1.0, 0.9, 0.7):
        loss = F.binary_cross_entropy_with_logits(a, torch.full_like(a, label), reduction="none")
        line, = smoothing.plot(a, loss, label=f"real label {label}")
        if label < 1:
            smoothing.axhline(loss.min(), color=line.get_color(), linestyle=":")
    smoothing.set(title="dotted: H(label), the minimum", ylim=(0, 2),
                  xlabel="D's logit on a real picture", ylabel="D's loss, nats")
    s = a.clamp(min=0)
    for name, f, colour in (("once", lambda a: a, "C0"), ("twice", torch.sigmoid, "C3")):
        twice.plot(s, F.softplus(-f(s)) + F.softplus(f(-s)), colour, label=f"Loss_D, {name}")
        twice.plot(s, F.softplus(-f(-s)), colour, linestyle="--", label=f"Loss_G, {name}")
    twice.set(title="a sigmoid applied twice: 1.0064, 0.6931", xlim=(0, 8), ylim=(0, 2),
              xlabel="D's logit: +a on reals, -a on fakes", ylabel="loss, nats")


@theme
def orders_of_play():
    """One report states minimax-maximin, with its condition, and that is right. An equilibrium is
    an entry that is the smallest of its column (G chooses the row) and the largest of its row.
    Matching pennies has none, and the player who moves second wins, because it knows more. Over
    distributions both orders give -log 4: q = p, D = 1/2 is a saddle point. Over weights they need
    not: a G that makes one picture has the same max min, but the min max 2 JSD - log 4. Gradient
    steps do not say which order they follow, and with max min G collapses."""
    # max_D min_G V and min_G max_D V of V [n, moves of G, moves of D]
    both_orders = lambda games: (games.amin(1).amax(1), games.amax(2).amin(1))
    games = torch.randint(10, (1000, 4, 5))
    max_min, min_max = both_orders(games)
    saddle = (games == games.amin(1, keepdim=True)) & (games == games.amax(2, keepdim=True))
    saddle = saddle.flatten(1).any(dim=1)
    below, above = (v.item() for v in both_orders(torch.tensor([[[1, -1], [-1, 1]]])))
    yield holds("minimax-maximin", "min_G max_D V = max_D min_G V, given an equilibrium.",
                *agree(1000, ((max_min == min_max) == saddle).sum().item(), "of 1000 games",
                       note=f"{saddle.sum()} have one; pennies: {below} and {above}",
                       and_also=0 < saddle.sum().item() < 1000 and below < above))
    max_min, min_max = both_orders(normal(1000, 4, 5))
    yield holds("minimax-bound", "max_D min_G V <= min_G max_D V.",
                *agree(1000, (max_min <= min_max).sum().item(), "of 1000 games"))
    p, D, half = normal(6).softmax(0), torch.rand(6).double(), double(6 * [0.5])
    points, others = torch.eye(6).double(), normal(100, 6).softmax(1)
    collapsed = gan_value(D, p, points[D.argmax()]).item()
    lowest = min(gan_value(D, p, q).item() for q in others)
    saddle = (all(abs(gan_value(half, p, q) + math.log(4)) < ROUNDING for q in others)
              and all(gan_value(one, p, p) <= -math.log(4) for one in torch.rand(100, 6).double()))
    min_max = min(gan_value(p / (p + q), p, q).item() for q in points)
    yield holds("maximin-collapse", "For a fixed D, G's best q is all on argmax D: one mode.",
                f"below {lowest:.3f}, the best of 100", f"{collapsed:.3f} (one picture: min max "
                f"{min_max:.3f}, max min {-math.log(4):.3f})",
                collapsed < lowest and saddle and min_max > -math.log(4) + 0.1)


def bilinear_step(x, y, eta, k=0, exact=True, alternating=False, r1=0.0):
    """One step of the game V = x y - r1 y²/2 by autograd: x descends, y ascends.
    eta: the learning rate. y_k is y after k steps, and x descends on x y_k. exact: the gradient
    also flows through these steps; if False, y_k is a constant ("rollback"). y's own step is from y
    and uses the old x, or, if alternating, the new one. r1: weight of the R1 penalty, which is y²,
    because y is the gradient of D's linear score. x and y are float64 scalar tensors, and so are
    the two that are returned, the new x and y, without a graph."""
    x = x.detach().requires_grad_()
    y_k = y
    for _ in range(k):
        y_k = y_k + eta * ((x if exact else x.detach()) - r1 * y_k)  # ∂V/∂y = x - r1 y
    x_new = x - eta * torch.autograd.grad(x * y_k, x)[0]
    return x_new.detach(), y + eta * ((x_new if alternating else x).detach() - r1 * y)


def momentum_step(x, y, x_before, y_before, eta, momentum, alternating=True):
    """One step of the game V = x y by the heavy-ball method: a gradient step of size eta plus
    `momentum` times the player's last move, x - x_before or y - y_before. x descends, y ascends on
    the old x or, if alternating, the new one. Returns the new x and y, then the old x and y."""
    x_new = x - eta * y + momentum * (x - x_before)
    y_new = y + eta * (x_new if alternating else x) + momentum * (y - y_before)
    return x_new, y_new, x, y


def growth(step, n):
    """The largest modulus of the eigenvalues of step, a linear map of n values: a float.
    step takes n float64 scalar tensors and returns n. In the long run every step multiplies the
    distance to the solution 0 by the result."""
    matrix = torch.stack([torch.stack(step(*unit)) for unit in torch.eye(n).double()], dim=1)
    matrix[matrix.abs() < 1e-100] = 0  # less than rounding, and LAPACK fails for some of 1e-260
    return torch.linalg.eigvals(matrix).abs().max().item()


@theme
def the_smallest_gan():
    """In V = x y, x is G's weight and y is D's. Unrolling shows x the next k steps of y; rollback
    is without the gradient through them. For (k + 1/2) η < 1 a step multiplies the distance to (0,
    0) by the root of its determinant. Both at once: 1 + η² (plain), 1 - (2k - 1) η² (exact), 1 - (k
    - 1) η² (rollback). In turn, as in chapter 03: 1 (plain), 1 - 2k η², 1 - k η². One report found
    k >= 2 for rollback, but it trains in turn: this game does not explain it. Momentum 0.5, Adam's
    usual beta1 for a GAN, loses the game (Gidel et al. 2019, arXiv:1807.04740). Would R1 suit an
    unrolled GAN? Here one can replace the other: for γ = 2 k η both have the same determinant and
    trace. R1 (Mescheder et al. 2018) pulls y to 0, unrolling x."""
    game = lambda **kind: growth(functools.partial(bilinear_step, eta=eta, **kind), 2)
    eta, pairs, works = 0.1, [], {False: [], True: []}
    for in_turn, k in itertools.product((False, True), range(6)):
        exact, rollback = (game(k=k, exact=how, alternating=in_turn) for how in (True, False))
        pairs += [(1 - (2 * k - (not in_turn)) * eta ** 2, exact),
                  (1 - (k - (not in_turn)) * eta ** 2, rollback)]
        if rollback < 1 - ROUNDING:
            works[in_turn].append(k)
    roots = all(abs(det ** 0.5 - growth) < ROUNDING for det, growth in pairs)
    plain, plain_in_turn = (game(alternating=how) for how in (False, True))
    least = ", ".join(str(min(works[how], default="none")) for how in (False, True))
    yield holds("bilinear-game", "On V = x y rollback unrolling works from k = 2 if both move at "
                "once, from k = 1 if in turn.", "from k = 2, 1",
                f"from k = {least} (plain {plain:.4g}, in turn {plain_in_turn:.4g})",
                roots and works == {False: [2, 3, 4, 5], True: [1, 2, 3, 4, 5]})
    circle, outwards, inwards = (growth(functools.partial(
        momentum_step, eta=eta, momentum=m), 4) for m in (0.0, 0.5, -0.3))
    yield holds("momentum-game", "On V = x y, in turn, momentum 0.5 makes the circle a growing "
                "spiral, -0.3 a shrinking one.", "1, above 1, below 1", f"{circle:.4f}, "
                f"{outwards:.4f}, {inwards:.4f}", inwards < 0.999 < circle < 1.001 < outwards)
    pairs = []
    for in_turn, k in itertools.product((False, True), range(1, 6)):
        unrolled, r1 = (torch.stack([torch.stack(bilinear_step(
            *unit, eta, alternating=in_turn, **kind)) for unit in torch.eye(2).double()], dim=1)
            for kind in (dict(k=k), dict(r1=2 * k * eta)))
        determinant = torch.linalg.det(r1)
        pairs += [(torch.linalg.det(unrolled), determinant), (unrolled.trace(), r1.trace())]
    yield holds("r1-game", "On V = x y R1 of weight 2 k η damps as k exactly unrolled steps do.",
                *equal(*pairs, note=f"k = 5, in turn: determinant {determinant:.2f}"))


@figure("bilinear", "V = x y: x descends, y ascends, η = 0.1, 150 steps from the black dot",
        2, 4, width=3, height=3.6)
def plot_bilinear(*panels):
    kinds = {"plain": {}, "rollback, k = 1": dict(k=1, exact=False),
             "rollback, k = 2": dict(k=2, exact=False), "exact, k = 1": dict(k=1),
             "in turn": dict(alternating=True),
             "in turn, rollback, k = 1": dict(k=1, exact=False, alternating=True)}
    games = {name: (functools.partial(bilinear_step, eta=0.1, **kind), 2)
             for name, kind in kinds.items()}
    games |= {f"in turn, momentum {m}": (functools.partial(momentum_step, eta=0.1, momentum=m), 4)
              for m in (0.5, -0.3)}
    for ax, (name, (step, n)) in zip(panels, games.items()):
        path = [(double(1.0), double(0.0)) * (n // 2)]
        while len(path) < 151 and max(map(abs, path[-1])) < 2.2:
            path.append(step(*path[-1]))
        ax.plot(*torch.tensor(path)[:, :2].T, linewidth=1)
        ax.plot(1, 0, "o", color="black", markersize=4)
        ax.set(title=f"{name}\ndistance × {growth(step, n):.3f} a step", aspect="equal",
               xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xlabel="x", ylabel="y")


@theme
def critics():
    """js-vs-w1 is why a WGAN has a gradient where a GAN has none (Arjovsky et al. 2017, example 1).
    W1 is the distance over which probability must move; across the lines each is one point. A
    penalty that is 0 for a zero critic has lost its -1. Its gradient in w must be 2 (1 - 1/‖w‖) w,
    or it trains nothing. uᵀ W v of unit vectors never exceeds the largest singular value."""
    cells = torch.eye(21, dtype=torch.float64)  # row d: a distribution that is all in cell d
    pairs = [(jensen_shannon(cells[0], cells[0]), 0)]
    for d in range(1, 21):
        pairs += [(jensen_shannon(cells[0], cells[d]), math.log(2)),
                  ((cells[0] - cells[d]).cumsum(0).abs().sum(), d)]  # W1 on a line
    yield holds("js-vs-w1", "Two parallel lines at distance d: JSD = log 2 for every d ≠ 0, W1 = "
                "d.", *equal(*pairs))
    x, w = normal(16, 5), normal(5)
    penalty = lambda w: ((vmap(jacrev(lambda x: x @ w))(x).norm(dim=1) - 1) ** 2).mean()
    yield holds("gp-linear", "A critic f(x) = w.x has the penalty (‖w‖ - 1)², a zero critic 1.",
                *equal((penalty(w), (w.norm() - 1) ** 2), (penalty(0 * w), 1),
                       (gradient(penalty, w), 2 * (1 - 1 / w.norm()) * w)))
    w, u, sigmas = normal(8, 5), F.normalize(normal(8), dim=0), []
    for _ in range(2000):
        v = F.normalize(w.T @ u, dim=0)
        u = F.normalize(w @ v, dim=0)
        sigmas.append(u @ w @ v)
    largest, sigmas = torch.linalg.svdvals(w)[0].item(), torch.stack(sigmas)
    rises = (sigmas.diff() > -ROUNDING).all() and (sigmas <= largest + ROUNDING).all()
    yield holds("spectral", "Power iteration converges to the largest singular value from below.",
                *agree(largest, sigmas[-1].item(), tolerance=1e-6, and_also=rises))


# --- samples and scores ------------------------------------------------------------------------

TOPICS["samples and scores"] = """Is a sample good, and who says so? A score squeezes many pictures
    into one number, so it has blind spots. The MMD is a distance made from a kernel; the Inception
    score (IS) and the FID look through a classifier. The last claims are about making samples."""


def inception_score(probs):
    """IS = exp(mean_x KL(p(y given x) ‖ p(y))), p(y) the mean; probs [N, K], rows sum to 1.
    Returns a scalar tensor. Where a probability is 0, its gradient is 0. Raises ValueError for rows
    that are not probabilities, such as logits."""
    if (probs < 0).any() or not ((probs.sum(dim=1) - 1).abs() < 0.01).all():
        raise ValueError("the rows of probs must be >= 0 and sum to 1: take a softmax")
    kl = (x_log_y(probs, probs) - x_log_y(probs, probs.mean(dim=0))).sum(dim=1)
    return kl.mean().exp()


def frechet_distance(mu_a, cov_a, mu_b, cov_b):
    """‖mu_a - mu_b‖² + tr(A + B - 2 (A^½ B A^½)^½): squared W2 of Gaussians, mu [d], cov [d, d].
    A and B are the covariances, A^½ A^½ = A. Dowson, Landau 1982; Heusel et al. 2017 take it over
    features of an Inception network and call it FID. Returns a float64 scalar: float32 could make
    it negative. Raises ValueError if the shapes do not fit, an entry is not finite, or a covariance
    is not symmetric or has negative eigenvalues, by more than 1e-4 of the largest."""
    mu_a, cov_a, mu_b, cov_b = every = [a.double() for a in (mu_a, cov_a, mu_b, cov_b)]
    shapes, d = [tuple(a.shape) for a in every], mu_a.numel()
    if shapes != 2 * [(d,), (d, d)] or not all(a.isfinite().all() for a in every):
        raise ValueError(f"finite mu [d], cov [d, d] must fit, not {shapes}")
    for cov in (cov_a, cov_b):
        eigenvalues = torch.linalg.eigvalsh(cov)
        if max((cov - cov.T).abs().max(), -eigenvalues[0]) > 1e-4 * eigenvalues.abs().max():
            raise ValueError("a covariance is not symmetric, or has negative eigenvalues")
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mu_a - mu_b).pow(2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross


@theme
def blind_spots():
    """In one report the loss of a Wasserstein autoencoder (chapter 06) compares z, z² and z⁴ on
    average. A z that is -√3, 0 or √3 with probabilities 1/6, 2/3, 1/6 agrees with N(0, 1) in all
    three; an MMD tells them apart. log IS is the mutual information of picture and class: log K if
    all answers are sure and all classes equally frequent (Salimans et al. 2016)."""
    def normal_points(n):  # N(0, 1) as n points, and their weights
        middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return torch.special.ndtri(middle), torch.full_like(middle, 1 / n)
    def mmd(x, p, y, q):  # squared, of weighted points, with the kernel 1 / (1 + (a - b)²)
        points, weights = torch.cat([x, y]), torch.cat([p, -q])
        return (weights @ (1 / (1 + (points[:, None] - points) ** 2)) @ weights).item()
    z, probability = double(THREE_POINTS), double(THREE_WEIGHTS)
    mean, variance, kurtosis = ((probability @ z ** k).item() for k in (1, 2, 4))
    apart = mmd(z, probability, *normal_points(2000))
    same = abs(mmd(*normal_points(1999), *normal_points(2000)))  # normal and normal
    yield refuted("moments-not-gaussian", "Mean 0, variance 1 and kurtosis 3 make a Gaussian.",
                  "MMD² 0", f"moments {abs(mean):.0f}, {variance:.4g}, {kurtosis:.4g}; MMD² "
                  f"{apart:.2g} (normal: {same:.0e})", apart > 100 * same and max(
                      abs(mean), abs(variance - 1), abs(kurtosis - 3)) < ROUNDING)
    lowest = inception_score(normal(10).softmax(0).expand(50, 10)).item()
    highest = inception_score(torch.eye(10, dtype=torch.float64).repeat(5, 1)).item()
    between = [inception_score((3 * normal(50, 10)).softmax(1)).item() for _ in range(100)]
    yield holds("inception-bounds", "1 <= IS <= K, the number of classes, with both reached.",
                "1 <= IS <= 10", f"{lowest:.4g}, {min(between):.3g} to {max(between):.3g}, "
                f"{highest:.4g}", abs(lowest - 1) < ROUNDING and abs(highest - 10) < ROUNDING
                and all(1 < score < 10 for score in between))
    turn = torch.linalg.qr(normal(4, 4))[0]
    a, b, shift = torch.rand(4).double(), torch.rand(4).double(), normal(4)
    cov_a, cov_b = turn * a @ turn.T, turn * b @ turn.T
    expected = shift.pow(2).sum() + (a.sqrt() - b.sqrt()).pow(2).sum()
    yield holds("fid-gaussians", "FID of two Gaussians: 0 for equal ones, ‖Δmu‖² + Σ (√a - √b)² if "
                "the covariances share eigenvectors, with eigenvalues a and b.", *equal(
                    (frechet_distance(shift, cov_a, 0 * shift, cov_b), expected),
                    (frechet_distance(shift, cov_a, shift, cov_a), 0)))


def truncated_normal_variance(limit):
    """Variance of N(0, 1) given |z| <= limit: 1 - 2 t φ(t) / (2 Φ(t) - 1), t = limit; a float.
    For a small t this difference loses all digits. It is also P(3/2, t²/2) / P(1/2, t²/2), with
    P the incomplete gamma function over the complete one, as E z² is an integral of it. limit: from
    1e-50 to inf, which gives 1. Raises ValueError for others."""
    if not limit >= 1e-50:
        raise ValueError(f"a limit from 1e-50 on, not {limit}")
    half = double(limit) ** 2 / 2
    return (torch.special.gammainc(double(1.5), half)
            / torch.special.gammainc(double(0.5), half)).item()


def merge_batch_statistics(counts, means, variances):
    """Mean and (population) variance [C] of the joined batch from those of its R parts.
    counts [R] of any type, means and variances [R, C]. mean = Σ n_r m_r / n and variance =
    Σ n_r (v_r + (m_r - mean)²) / n: the spread inside the parts and that between them (Chan et al.
    1979). Empty parts, whose own mean is nan, do not count. Raises ValueError if all are empty, or
    if the shapes do not fit."""
    shapes = [tuple(a.shape) for a in (counts, means, variances)]
    if shapes != [shapes[1][:1], shapes[1], shapes[1]] or means.ndim != 2 or not counts.sum() > 0:
        raise ValueError(f"counts [R], not all 0, and twice [R, C] must fit, not {shapes}")
    means, variances = means[counts > 0], variances[counts > 0]
    share = counts[counts > 0, None].to(means) / counts.sum()
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(dim=0)


@theme
def how_samples_are_made():
    """Brock et al. 2019 truncate for quality, at the cost of diversity; the pictures of chapter 07
    do not get better. In cross-replica-bn a device has a part of the batch, and its own statistics
    hide how the parts differ. One report states parameter-counts; the layers were chosen to fit."""
    limits = double([0.5, 1.0, 2.0, math.inf])
    z = limits[:3, None] * (torch.arange(200_000) + 0.5) / 200_000
    density = (-z ** 2 / 2).exp()
    summed = (density * z ** 2).sum(dim=1) / density.sum(dim=1)
    formula = double([truncated_normal_variance(limit) for limit in limits.tolist()])
    claimed, measured = (", ".join(f"{v:.4f}" for v in side[:3]) for side in (formula, summed))
    yield holds("truncation", "Truncating z lowers its variance, more so for a lower threshold.",
                claimed, measured, ((formula[:3] - summed).abs().max() < ROUNDING).item()
                and (formula.diff() > 0).all().item())
    x = normal(20, 3) + torch.arange(20)[:, None] // 8
    parts = x.split(8)  # of 8, 8 and 4 samples
    mean, variance = merge_batch_statistics(double([8, 8, 4]), *(torch.stack(
        [f(part) for part in parts]) for f in (
            lambda x: x.mean(0), lambda x: x.var(0, correction=0))))
    joined, *alone = (F.batch_norm(part, None, None, training=True) for part in (x, *parts))
    apart = (torch.cat(alone) - joined).abs().max().item()
    yield holds("cross-replica-bn", "Batch norm with statistics merged over all devices is batch "
                "norm of the joined batch.", *equal(
                    ((x - mean) / (variance + 1e-5).sqrt(), joined),  # 1e-5: torch's default
                    note=f"each alone: {apart:.2f}", and_also=apart > 0.1))
    linear = lambda *sizes: [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    up = [nn.ConvTranspose2d(n, m, k) for n, m, k in ((16, 16, 4), (16, 8, 4), (8, 1, 3))]
    G, D = linear(50, 500, 500, 784) + up, linear(784, 1024, 512, 256, 1)
    yield holds("parameter-counts", "An unrolled GAN's networks (chapter 03) have 675,025 and "
                "1,460,225 parameters.", *exactly([675_025, 1_460_225], [
                    sum(p.numel() for p in nn.Sequential(*net).parameters()) for net in (G, D)]))


# --- main --------------------------------------------------------------------------------------

def run(check, seeds):
    """For each claim of a theme: a row, and for how many of `seeds` the evidence is True.
    The row is the first without evidence, or the first. Each claim starts from the seed, whatever
    the theme has computed before it."""
    found, right = {}, lambda row: row.evidence is True
    for seed in seeds:
        torch.manual_seed(seed)
        for row in check():
            found.setdefault(row.name, []).append(row)
            torch.manual_seed(seed)
    return [(min(rows, key=right), sum(map(right, rows))) for rows in found.values()]


def paragraph(text):
    """The text in lines of 80 characters."""
    return textwrap.fill(" ".join((text or "").split()), 80)  # python -OO leaves docstrings out


def print_rows(header, rows, widths):
    """A table whose cells are wrapped to these widths."""
    cells = [[textwrap.wrap(text, width) for text, width in zip(row, widths)] for row in rows]
    common.print_table(header, [line for row in cells
                                for line in itertools.zip_longest(*row, fillvalue="")])


def print_results(results, seeds):
    """The table of what run() returns for that many seeds; 100 columns wide."""
    print_rows(["claim", "the claim says", "measured", "verdict"], [
        (row.name, row.claimed, row.measured,
         row.verdict + f": confirmed by {n} of {seeds} seeds" * (n < seeds))
        for row, n in results], (20, 24, 41, 9))


def answer():
    """The first letter of "holds" or "refuted", "" to skip, or "q", as at the end of the input."""
    while True:
        print("holds or refuted? (h/r; an empty line skips the claim, q ends)", flush=True)
        line = sys.stdin.readline() if sys.stdin else ""  # None if it was closed from the start
        text = line.strip().lower() if line else "q"
        if text in ("h", "holds", "r", "refuted", "", "q"):
            return text[:1]


def predict(names, seed):
    """Asks what becomes of each claim, then checks it with one seed, and counts the hits.
    The reasons follow at the end, as those of a theme answer several questions."""
    right, asked = 0, []
    for i, name in enumerate(names, 1):
        claim = CLAIMS[name]
        print(f"\n{i} of {len(names)}: {name}\n{paragraph(claim.statement)}")
        guess = answer()
        if guess == "q":
            break
        if guess:
            hit = guess == claim.verdict[0]
            right += hit
            asked.append(claim.theme)
            print("right" if hit else "wrong")
            print_results([found for found in run(claim.theme, [seed]) if found[0].name == name], 1)
    for check in dict.fromkeys(asked):
        print(f"\n{paragraph(check.__doc__)}")
    print(f"\nyou were right on {right} of {len(asked)}")


def parse_args(argv=None):
    p = common.parser(__doc__, __file__, trains=False)
    g = p.add_argument_group("claims")
    g.add_argument("--only", nargs="+", metavar="ID", help="check only the themes of these claims")
    g.add_argument("--predict", action="store_true", help="a quiz: guess first, then see why")
    g.add_argument("--list", action="store_true", help="print what each claim states; no checks")
    args = common.parse(p, argv, quick={})
    for name in args.only or []:
        if name not in CLAIMS:
            near = " or ".join(difflib.get_close_matches(name, CLAIMS))
            common.fail(f"no claim is called {name!r}: see --list" + f"; did you mean {near}?"
                        * bool(near))
    return args


def main(argv=None):
    args = parse_args(argv)
    names = args.only or list(CLAIMS)
    if args.list:
        return print_rows(["claim", "verdict", "statement"], [
            (name, claim.verdict, claim.statement) for name, claim in CLAIMS.items()], (20, 7, 69))
    if args.predict:
        return predict(names, args.seed)
    seeds, results = range(args.seed, args.seed + (1 if args.quick else SEEDS)), []
    if not args.only:
        common.Run(args)  # makes the folder
    for topic, introduction in TOPICS.items():
        themes = dict.fromkeys(CLAIMS[name].theme for name in names if CLAIMS[name].topic == topic)
        if themes:
            print(f"\n{topic}\n{paragraph(introduction)}\n", flush=True)
            found = [result for check in themes for result in run(check, seeds)]
            print_results(found, len(seeds))
            results += found
        for check in themes if args.only else ():
            stated = [f"{n}: {c.statement}" for n, c in CLAIMS.items() if c.theme is check]
            print("", *stated, paragraph(check.__doc__), sep="\n")
    print()
    for name, make in FIGURES.items() if not args.only else ():
        common.save_figure(make(), args.out / f"{name}.png")
    wrong = [row.name for row, n in results if n < len(seeds)]
    if wrong:
        common.fail(f"not the expected verdict: {', '.join(wrong)}", status=1)
    print(f"verdicts as expected: {len(results)} of {len(results)}, seeds for each: {len(seeds)}")


if __name__ == "__main__":
    main()
