"""Render a synthetic sample of a fixed-camera mall video in the format of the Mall dataset.

    python tests/tools/render_sample.py [--seed 0] [--frames 200] [--out FOLDER]

writes FOLDER/labels.csv (columns id,count, ids from 1) and FOLDER/frames/frames/seq_000001.jpg ...
(640x480 RGB).  A count is the number of people whose head is inside the picture and of whose body at
least MIN_VISIBLE is hidden neither by clutter nor by others.

World coordinates are metres: x to the right, y up from the floor, z away from the camera.  The camera
looks level through a lens shifted down, so verticals stay vertical and a metre at depth z spans
FOCAL / z pixels.  Images are floats in 0..1, shape (height, width, 3); sprites have a fourth channel,
alpha, and colours multiplied by it.  A frame depends only on the seed and on the frames before it, so
a short rendering is the beginning of a long one.
"""
import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from scipy import ndimage

WIDTH, HEIGHT = 640, 480
FOCAL, EYE, VANISH_X, HORIZON = 500.0, 6.2, 260.0, 40.0  # px, m, px, px
LEFT, RIGHT, BACK = -10.0, 13.0, 34.0  # walls, m
SS = 2  # supersampling along each axis
JPEG_QUALITY = 68
COMMENT = b"synthetic mall sample"  # in every JPEG file: marks a frame as ours to overwrite
MIN_VISIBLE = 0.1

FRAME_SECONDS, SUBSTEPS = 1.5, 5
WARMUP = 60  # frames simulated before the first one shown
CROWD_MEAN, CROWD_RANGE = 33.5, (15.0, 54.0)  # people aimed at; some will be hidden

PORTALS = np.array([  # (x, z) where people come and go: back entrance, shop doors, picture edges
    (1.5, 34.5), (-10.4, 23.5), (-10.4, 30.5), (13.4, 20.5), (13.4, 28.5), (-7.3, 12.5), (-9.6, 16.5),
    (8.6, 10.0), (11.6, 14.2), (-1.5, 4.7), (1.5, 4.7), (3.5, 4.8)])
CLOTHES = np.array([  # many dark, some close to the floor, a few loud
    (22, 23, 28), (34, 36, 46), (48, 44, 44), (30, 40, 66), (58, 70, 98), (84, 92, 104), (128, 128, 130),
    (196, 190, 182), (186, 170, 148), (164, 142, 116), (228, 228, 224), (120, 86, 60), (96, 30, 36),
    (172, 44, 42), (206, 120, 62), (70, 96, 66), (52, 112, 122), (88, 128, 178), (196, 148, 168),
    (214, 184, 90)]) / 255
TROUSERS = CLOTHES[[0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 8, 9, 11, 10]]
SKIN = np.array([(236, 196, 168), (222, 176, 144), (198, 150, 116), (150, 104, 76), (98, 66, 48)]) / 255
HAIR = np.array([(24, 20, 20), (38, 28, 24), (70, 46, 30), (120, 84, 50),
                 (176, 142, 92), (150, 148, 146)]) / 255
STONE, WOOD, DARK, PALE, RED = np.array([
    (0.80, 0.77, 0.72), (0.50, 0.34, 0.22), (0.22, 0.22, 0.24), (0.90, 0.86, 0.80), (0.62, 0.20, 0.16)])


def project(points):
    """World points (..., 3) in metres to picture x, y and magnification, in px, px and px/m."""
    x, y, z = np.moveaxis(np.asarray(points, float), -1, 0)
    scale = FOCAL / z
    return VANISH_X + x * scale, HORIZON + (EYE - y) * scale, scale


def mix(a, b, weight):
    """Colours a (..., 3) moved towards b by weight (...,)."""
    return a + (np.asarray(b, np.float32) - a) * np.asarray(weight, np.float32)[..., None]


def shrink(image):
    """Average blocks of SS x SS pixels: (h * SS, w * SS, c) to (h, w, c)."""
    h, w, c = image.shape
    return image.reshape(h // SS, SS, w // SS, SS, c).mean((1, 3))


# The building: ray-cast once.


def shopfronts(along, up, along_in, up_in, table):
    """Colour (..., 3) of a wall at (along, up); (along_in, up_in) is the point seen through its glass.

    table: (64, 64, 3) uniform random numbers, from which all that is arbitrary is looked up.
    """
    def panel(where, rgb):
        nonlocal colour
        colour = np.where(where[..., None], rgb, colour).astype(np.float32)

    bay, a = np.divmod(along, 5.0)
    bay, column, shelf = (np.floor(k).astype(int) % 64 for k in (bay, along_in / 0.5, up_in / 0.6))
    hue, goods = CLOTHES[5 + bay * 7 % 15].astype(np.float32), table[column, shelf]
    lit = np.float32((1.0, 0.92, 0.78)) * (0.55 + 0.45 * table[bay, 7, :1])
    stock = (0.55 + 0.8 * goods[..., :1]) * mix(hue, (0.80, 0.70, 0.56), 0.6)
    stock = mix(stock, goods, 0.5 * (goods[..., 1] > 0.75))
    colour = mix(lit, stock, 0.75 * (table[column // 2, 9, 0] > 0.4) * (up_in < 2.3))
    colour = colour * (0.65 + 0.45 * np.clip(up_in / 2.6, 0, 1))[..., None]
    colour = mix(colour, (0.20, 0.17, 0.15), 0.5 * (up_in % 0.6 < 0.06))
    streaks = np.maximum(np.sin(along * 1.1 + up * 1.7) - 0.55, 0.5 * np.sin(along * 3.1 + up * 1.7) - 0.4)
    colour = mix(colour, (0.80, 0.88, 0.95), 0.1 + 0.6 * np.maximum(streaks, 0))  # the hall, in the glass
    panel((a % 1.5 < 0.08) | (np.abs(up - 2.4) < 0.035), (0.28, 0.28, 0.30))
    panel(up < 0.2, (0.25, 0.22, 0.20))
    panel(a < 0.7, (0.78, 0.74, 0.68))
    sign = (up > 2.9) & (a >= 0.7)
    stroke = table[np.floor(along / 0.13).astype(int) % 64, np.floor(up / 0.16).astype(int) % 64, 1] > 0.4
    panel(sign, 0.85 * hue)
    panel(sign & stroke & (np.abs(up - 3.4) < 0.24) & (np.abs(a - 2.8) < 1.3) & (along % 0.52 < 0.4),
          np.where(hue.mean(-1, keepdims=True) > 0.55, 0.15, 0.97))
    panel(up > 3.9, (0.80, 0.77, 0.72))  # from here the gallery: slab, windows, glass railing, ceiling
    panel(up > 4.7, (0.62, 0.58, 0.53))
    panel((up > 4.7) & (a % 2.5 > 0.35), 0.62 * lit * (0.6 + 0.5 * table[column // 3, 13, :1]))
    railing = (up > 4.7) & (up < 5.8)
    colour = mix(colour, (0.62, 0.72, 0.74), 0.45 * railing)
    panel((np.abs(up - 5.8) < 0.06) | (railing & (along % 1.6 < 0.07)), (0.30, 0.30, 0.32))
    panel(up > 7.4, (0.84, 0.82, 0.78))
    panel(up > 8.2, (0.55, 0.53, 0.50))
    panel(up > 9.5, (0.85, 0.90, 0.97))  # skylight
    return colour


def walls(u, w, eye, table):
    """Colour (..., 3) and depth (...,) of the walls met by rays (u, -w, 1) from height eye."""
    side_x = np.where(u < 0, LEFT, RIGHT)
    with np.errstate(divide="ignore"):
        z = np.minimum(side_x / u, BACK)
    on_side = z < BACK
    z_in = np.where(on_side, z * (1 + 1.6 / np.abs(side_x)), BACK + 1.6)  # shops are 1.6 m deep
    along, along_in = (np.where(on_side, d + 83 * (u > 0), u * d + 41) for d in (z, z_in))
    up, x = eye - w * z, u * BACK
    colour = shopfronts(along, up, along_in, np.maximum(eye - w * z_in, 0), table)
    day = mix(np.float32((0.86, 0.91, 0.96)), (0.72, 0.74, 0.70), 0.8 * np.clip(1.2 - up / 1.5, 0, 1))
    day = mix(day, (0.30, 0.31, 0.33), ((x - 1.5) % 1.5 < 0.1) | (up > 3.0))
    entrance = ~on_side & (np.abs(x - 1.5) < 3) & (up < 3.2)
    return np.where(entrance[..., None], day, colour), z


def tiles(x, z, table, marble):
    """Colour (n, 3) of the floor at x, z (n,); marble: (512, 512) zero-mean texture."""
    i, j = np.floor(x).astype(int) % 64, np.floor(z).astype(int) % 64
    colour = np.float32((0.73, 0.655, 0.56)) * (0.94 + 0.12 * table[i, j, :1])
    colour = mix(colour, (0.53, 0.44, 0.37), 0.75 * (((x - 1) % 7 < 1) | (z % 7 < 1)))
    diamond = np.abs((x - 1) % 7 - 0.5) + np.abs(z % 7 - 0.5) < 0.42
    colour = mix(colour, (0.30, 0.25, 0.23), 0.8 * diamond)
    grout = np.minimum(np.abs(x - np.round(x)), np.abs(z - np.round(z))) < 0.014 + 0.0006 * z
    veins = marble[(x * 37).astype(int) % 512, (z * 37).astype(int) % 512]
    return colour * ((1 + 0.05 * veins) * np.where(grout, 0.78, 1))[..., None]


def backdrop(rng):
    """The empty building (HEIGHT, WIDTH, 3), and x, z (HEIGHT, WIDTH) of its floor, 0 elsewhere."""
    table = rng.random((64, 64, 3), np.float32)
    marble = sum(ndimage.gaussian_filter(rng.normal(size=(512, 512)), s, mode="wrap") * s for s in (3, 12))
    px, py = (np.arange(n * SS, dtype=np.float32) / SS + 0.5 / SS for n in (WIDTH, HEIGHT))
    u, w = np.meshgrid((px - VANISH_X) / FOCAL, (py - HORIZON) / FOCAL)
    colour, z_wall = walls(u, w, EYE, table)
    mirror, _ = walls(u, -w, -EYE, table)  # the building below the floor, for reflections in it
    mirror = ndimage.gaussian_filter(mirror, (5 * SS, 1.5 * SS, 0))
    z = EYE / np.maximum(w, 1e-6)
    on_floor = z < z_wall
    x, z = np.where(on_floor, u * z, 0), np.where(on_floor, z, 0)
    xf, zf = x[on_floor], z[on_floor]
    corner = 1 - 0.35 * np.exp(-np.minimum(np.minimum(xf - LEFT, RIGHT - xf), BACK - zf) / 0.7)
    shine = 0.06 + 0.5 * (1 - EYE / np.hypot(EYE, zf)) ** 2  # polish shows at grazing angles
    colour[on_floor] = mix(tiles(xf, zf, table, marble) * corner[:, None], mirror[on_floor], shine)
    colour += 1.2 * ndimage.gaussian_filter(np.maximum(colour - 0.75, 0), (8 * SS, 8 * SS, 0))  # lens glow
    colour = ndimage.gaussian_filter(colour, (0.6 * SS, 0.6 * SS, 0))
    return shrink(colour), x[::SS, ::SS], z[::SS, ::SS]


# Clutter: solids on the floor, painted once, each a sprite of its own so that people pass behind it.


class Canvas:
    """A transparent picture at SS times the size, painted on in world coordinates."""

    def __init__(self, rng):
        self.rng, self.image = rng, Image.new("RGBA", (WIDTH * SS, HEIGHT * SS))
        self.draw = ImageDraw.Draw(self.image)

    def face(self, corners, rgb):
        x, y, _ = project(corners)
        fill = (*(int(255 * c) for c in np.clip(rgb, 0, 1)), 255)
        self.draw.polygon(list(zip(x * SS, y * SS)), fill=fill)

    def box(self, x0, x1, y0, y1, z0, z1, rgb):
        side = x0 if x0 > 0 else x1  # the one that faces the camera, which stands at x = 0
        self.face([(side, y0, z0), (side, y0, z1), (side, y1, z1), (side, y1, z0)], rgb * 0.6)
        self.face([(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)], rgb * 0.82)
        self.face([(x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)], rgb * 1.1)

    def cylinder(self, x, z, radius, y0, y1, rgb):
        def rim(angle, y):
            return x + radius * np.sin(angle), y, z - radius * np.cos(angle)

        edges = np.linspace(-1.7, 1.7, 33) + np.arctan2(-x, z)  # the half that faces the camera
        for a, b in zip(edges, edges[1:]):
            shade = 0.5 + 0.45 * max(0, np.cos(a + 0.6)) + 0.12 * max(0, np.cos(a - 1.5))
            self.face([rim(a, y0), rim(b, y0), rim(b, y1), rim(a, y1)], rgb * shade)
        if y1 < 1:  # planters and bins are open, pillars go on
            self.face([rim(a, y1) for a in np.linspace(0, 2 * np.pi, 40)], rgb * 0.55)

    def plant(self, x, z, y, radius, height, leaves, length, width):
        way = self.rng.normal(size=(leaves, 3)) * (1, 0.8, 1)
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        reach = (radius, height / 2, radius) * self.rng.uniform(0.1, 0.9, (leaves, 1))
        base = (x, y + height / 2, z) + way * reach
        for k in np.argsort(0.5 * base[:, 1] - base[:, 2]):
            size = length * self.rng.uniform(0.6, 1.2)
            tip = base[k] + way[k] * size - (0, 0.25 * size, 0)  # leaves droop
            middle, across = (base[k] + tip) / 2, np.cross(way[k], (0.3, 0.4, 1.0)) * size * width
            middle[1] += 0.12 * size
            shade = 0.35 + 0.45 * (base[k, 1] - y) / height + 0.35 * self.rng.random() - 0.12 * way[k, 0]
            green = np.array((0.30, 0.50, 0.20)) * shade + self.rng.uniform(-0.03, 0.03, 3)
            self.face([base[k], middle + across, tip, middle - across], green)

    def sprite(self):
        """Sprite (h, w, 4), cropped, and its corner (x, y)."""
        left, top, right, bottom = self.image.getbbox()
        x, y = left // SS, top // SS
        crop = self.image.crop((x * SS, y * SS, -(-right // SS) * SS, -(-bottom // SS) * SS))
        rgba = np.asarray(crop, np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:] * (1 + 0.015 * self.rng.normal(size=rgba.shape[:2]))[..., None]
        return shrink(rgba), (x, y)


def clutter(rng):
    """What stands on the floor: list of (x, z, footprint radius, sprite, corner)."""
    things = []

    def add(x, z, radius, *solids):
        """Solids are in painting order; boxes are given relative to (x, z)."""
        canvas = Canvas(rng)
        for kind, *size in solids:
            if kind == "box":
                x0, x1, y0, y1, z0, z1, rgb = size
                canvas.box(x + x0, x + x1, y0, y1, z + z0, z + z1, rgb)
            else:
                getattr(canvas, kind)(x, z, *size)
        things.append((x, z, radius, *canvas.sprite()))

    for x, z in ((-5.2, 14.5), (8.4, 14.5), (-5.2, 26.0), (8.4, 26.0)):  # pillars
        add(x, z, 0.75, ("cylinder", 0.58, 0, 0.3, DARK), ("cylinder", 0.5, 0.3, 12, STONE),
            ("cylinder", 0.51, 1.5, 1.58, STONE * 0.7), ("cylinder", 0.56, 4.0, 4.5, STONE))
    for x, z, size in ((-1.9, 11.4, 1), (5.1, 11.0, 0.9), (-7.6, 19.5, 1.1), (10.6, 21.5, 1.1), (-2, 29, 1)):
        add(x, z, 0.85, ("cylinder", 0.55 * size, 0, 0.6, STONE * 0.55),
            ("plant", 0.5, 0.55 * size, size, 220, 0.34, 0.2))
    add(-2.9, 7.5, 0.8, ("cylinder", 0.4, 0, 0.7, WOOD * 1.1), ("plant", 0.9, 0.45, 1.2, 260, 0.8, 0.1))
    add(2.3, 18.5, 2.1, ("box", -1.5, 1.5, 0, 1.1, -0.9, 0.9, RED),  # a kiosk, with goods under a roof
        ("box", -1.56, 1.56, 1.1, 1.18, -0.96, 0.96, PALE * 0.85),
        *(("box", k - 0.16, k + 0.16, 1.18, 1.5, -0.6, -0.2, rgb)
          for k, rgb in zip((-1.1, -0.5, 0.3, 0.9), CLOTHES[10:18:2])),
        *(("box", k - 0.05, k + 0.05, 1.18, 2.4, -0.8, -0.7, DARK) for k in (-1.4, 1.4)),
        ("box", -1.7, 1.7, 2.4, 2.75, -1.0, 1.0, PALE), ("box", -0.9, 0.9, 2.48, 2.66, -1.02, -1.01, RED))
    for x, z in ((1.7, 8.9), (-6.6, 22.6), (5.6, 22.5)):  # benches
        add(x, z, 1.1, *(("box", k, k + 0.15, 0, 0.4, -0.2, 0.2, DARK) for k in (-0.85, 0.7)),
            ("box", -1.0, 1.0, 0.4, 0.48, -0.28, 0.28, WOOD), ("box", -1.0, 1.0, 0.6, 0.95, 0.24, 0.3, WOOD))
    for x, z, rgb in ((3.3, 14.2, CLOTHES[16]), (-3.3, 20.5, CLOTHES[19] * 0.9)):  # advertising stands
        add(x, z, 0.7, ("box", -0.5, 0.5, 0, 1.9, -0.1, 0.1, DARK),
            ("box", -0.43, 0.43, 0.25, 1.82, -0.11, -0.1, rgb),
            *(("box", -0.3, k, y, y + k, -0.12, -0.11, PALE) for k, y in ((0.3, 1.25), (0.1, 0.9))))
    add(4.2, 8.6, 0.45, ("cylinder", 0.24, 0, 0.85, DARK * 2))  # a bin
    return things


# People: who they are and how they are drawn.


class Person:
    """Looks are drawn once; position (x, z), heading and walking cycle change with each frame."""

    def __init__(self, rng, child=False):
        def any_of(colours, *p):
            return colours[rng.choice(len(colours), p=p or None)]

        self.child = child
        self.height = rng.uniform(0.95, 1.35) if child else rng.normal(1.70, 0.085)
        self.build, self.pace = rng.uniform((0.9, 0.9), (1.2, 1.1))
        self.top, self.legs, self.bag_colour = any_of(CLOTHES), any_of(TROUSERS), any_of(CLOTHES)
        self.shoes = any_of(TROUSERS) * 0.6
        self.skin = any_of(SKIN, 0.3, 0.3, 0.2, 0.1, 0.1)
        self.hair = any_of(HAIR, 0.35, 0.25, 0.18, 0.08, 0.06, 0.08)
        self.pattern = rng.choice(["plain", "stripes", "checks"], p=(0.7, 0.2, 0.1))
        self.cut = rng.choice(["trousers", "coat", "skirt"], p=(0.62, 0.2, 0.18))
        self.bag = rng.choice(["none", "shoulder", "back", "hand"], p=(0.4, 0.2, 0.15, 0.25))
        self.long_hair, self.short_sleeves = rng.random(2) < (0.4, 0.35)
        self.texture, self.phase = rng.integers(0, 256, 2), rng.uniform(0, 2 * np.pi)
        self.position, self.heading, self.walking = np.zeros(2), np.array((0.0, -1.0)), True

    def in_view(self):
        """Whether the head is inside the picture, and the person inside the hall."""
        x, z = self.position
        px, py, _ = project((x, 0.92 * self.height, z))
        return 0 <= px < WIDTH and 0 <= py < HEIGHT and LEFT < x < RIGHT and z < BACK

    def body(self):
        """Tapered capsules: ends a, b (n, 3) and radii (n, 2) in m, colours (n, 3), patterns (n,)."""
        h, (fx, fz) = self.height, self.heading
        fat, head = self.build, 1.25 if self.child else 1.0
        wide = fat * np.hypot(fz, 0.72 * fx)  # a torso is wider than deep
        limbs = []

        def add(a, b, ra, rb, rgb, pattern="plain"):  # (right, up, forward) in units of height
            limbs.append((a, b, (ra, rb), rgb, pattern))

        for side in (-1, 1):
            s = side * np.sin(self.phase) if self.walking else 0.12 * side
            lift = max(0, 0.05 * side * np.cos(self.phase)) * self.walking
            hip, knee = (side * 0.045, 0.5, 0), (side * 0.045, 0.28 + lift, 0.09 * s + lift)
            foot = (side * 0.045, 0.035 + lift, 0.19 * s - lift)
            shoulder, elbow = (side * 0.1 * fat, 0.775, 0), (side * 0.125 * fat, 0.63, -0.05 * s)
            hand = (side * 0.12 * fat, 0.49, 0.03 - 0.15 * s)
            leg = self.skin if self.cut == "skirt" else self.legs
            add(hip, knee, 0.055 * fat, 0.042, leg)
            add(knee, foot, 0.042, 0.028, leg)
            add(foot, (side * 0.055, 0.02 + lift, foot[2] + 0.07), 0.028, 0.024, self.shoes)
            add(shoulder, elbow, 0.035 * fat, 0.031, self.top, self.pattern)
            add(elbow, hand, 0.03, 0.024, self.skin if self.short_sleeves else self.top)
            add(hand, (hand[0], 0.47, hand[2]), 0.024, 0.02, self.skin)
        if self.bag == "hand":
            x, _, z = hand
            add((x + 0.02, 0.42, z), (x + 0.02, 0.28, z), 0.055, 0.075, self.bag_colour)
        elif self.bag == "shoulder":
            add((0.13, 0.56, -0.01), (0.13, 0.49, -0.01), 0.045, 0.055, self.bag_colour)
        elif self.bag == "back":
            add((0, 0.75, -0.075), (0, 0.6, -0.085), 0.065, 0.075, self.bag_colour)
        if self.cut != "trousers":
            rgb = self.top if self.cut == "coat" else self.legs
            add((0, 0.54, 0), (0, 0.38, 0), 0.08 * wide, 0.092 * wide, rgb)
        add((0, 0.54, 0), (0, 0.735, 0), 0.082 * wide, 0.102 * wide, self.top, self.pattern)
        add((0, 0.82, 0), (0, 0.87, 0), 0.035, 0.032, self.skin)
        add((0, 0.895, 0.012), (0, 0.93, 0.012), 0.05 * head, 0.056 * head, self.skin)
        add((0, 0.915, -0.014), (0, 0.95, -0.004), 0.054 * head, 0.055 * head, self.hair)
        if self.long_hair:
            add((0, 0.92, -0.025), (0, 0.80, -0.045), 0.054, 0.04, self.hair)
        a, b, radii, colours, patterns = map(np.array, zip(*limbs))
        turn = h * np.array(((fz, 0, -fx), (0, 1, 0), (fx, 0, fz)))
        origin = (self.position[0], 0, self.position[1])
        return a @ turn + origin, b @ turn + origin, radii * h, colours, patterns

    def sprite(self, cloth):
        """Sprite (h, w, 4) of what falls inside the picture, and its corner (x, y).

        cloth: (256, 256) zero-mean texture.
        """
        a, b, radii, colours, patterns = self.body()
        (ax, ay, scale), (bx, by, _) = project(a), project(b)
        ra, rb = radii.T * scale
        reach = np.maximum(ra, rb)
        left, right = np.minimum(ax, bx) - reach, np.maximum(ax, bx) + reach
        top, bottom = np.minimum(ay, by) - reach, np.maximum(ay, by) + reach
        x0, x1 = np.clip((np.floor(left.min()), np.ceil(right.max())), 0, WIDTH).astype(int)
        y0, y1 = np.clip((np.floor(top.min()), np.ceil(bottom.max())), 0, HEIGHT).astype(int)
        out = np.zeros(((y1 - y0) * SS, (x1 - x0) * SS, 4), np.float32)
        px, py = (np.arange(n) / SS + 0.5 / SS + start for n, start in zip(out.shape[1::-1], (x0, y0)))
        depth = (a + b) @ (0, -0.5, 0.87)  # the camera looks down on people: higher is nearer
        for k in np.argsort(-depth, kind="stable"):
            cols = slice(*np.searchsorted(px, (left[k], right[k])))
            rows = slice(*np.searchsorted(py, (top[k], bottom[k])))
            dx, dy, ex, ey = px[cols] - ax[k], py[rows, None] - ay[k], bx[k] - ax[k], by[k] - ay[k]
            t = np.clip((dx * ex + dy * ey) / (ex * ex + ey * ey + 1e-9), 0, 1)
            r = ra[k] + (rb[k] - ra[k]) * t
            nx, ny = (dx - t * ex) / r, (dy - t * ey) / r  # surface normal of a round limb
            n2 = nx * nx + ny * ny
            cover = np.clip((1 - np.sqrt(n2)) * r * SS + 0.5, 0, 1)[..., None]
            light = 0.62 + 0.42 * (0.6 * np.sqrt(np.maximum(1 - n2, 0)) - 0.42 * nx - 0.5 * ny)
            metres = t * np.linalg.norm(b[k] - a[k])
            if patterns[k] == "stripes":
                light *= np.where(metres % 0.1 < 0.05, 1.25, 0.75)
            elif patterns[k] == "checks":
                light *= 1 + 0.2 * np.sign(np.sin(metres * 60)) + 0.2 * np.sign(np.sin(nx * 9))
            weave = (np.arange(s.start, s.stop) + shift for s, shift in zip((rows, cols), self.texture))
            light *= 1 + 0.04 * cloth[np.ix_(*(i % 256 for i in weave))]
            rgb = np.clip(colours[k] * light[..., None] + 0.01, 0, 1)
            rgba = np.concatenate([rgb, np.ones_like(cover)], -1)
            out[rows, cols] += (rgba - out[rows, cols]) * cover
        return shrink(out), (x0, y0)


# The crowd: groups on their way through the hall.


def push_out(position, things, margin):
    """Move a floor point (2,) out of every footprint, a little to one side so that walkers get round."""
    for x, z, radius, *_ in things:
        away = position - (x, z)
        if away @ away < (radius + margin) ** 2:
            away = away + 0.15 * np.array((-away[1], away[0])) + 1e-6
            position = (x, z) + away / np.sqrt(away @ away) * (radius + margin)
    return position


class Group:
    """People who follow a route, a list of (x, z, frames to stay), together and leave at its end."""

    def __init__(self, rng, members, start, route):
        self.rng, self.members, self.route, self.stay = rng, members, route, 0
        self.position, self.heading = start, np.array((0.0, -1.0))
        self.speed = rng.uniform(0.9, 1.4) * (0.8 if len(members) > 2 else 1)  # m/s

    def step(self, things):
        """Advance one frame; return whether the group is still here."""
        walked, resting = 0.0, self.stay > 0
        self.stay -= resting
        for _ in range(0 if resting else SUBSTEPS):
            way = self.route[0][:2] - self.position
            distance = np.sqrt(way @ way)
            if distance < 0.3:
                self.stay = self.route.pop(0)[2]
                break
            stride = way * min(1, self.speed * FRAME_SECONDS / SUBSTEPS / distance)
            before, self.position = self.position, push_out(self.position + stride, things, 0.3)
            moved = self.position - before
            step = np.sqrt(moved @ moved)
            walked += step
            if step > 0.01:
                self.heading = moved / step
        self.arrange(walked, things)
        return bool(self.route)

    def arrange(self, walked, things):
        """Walk two abreast; stand in a ring, face to face."""
        n, (fx, fz) = len(self.members), self.heading
        for k, person in enumerate(self.members):
            person.walking = walked > 0.3
            person.phase += walked * 4.2 * person.pace
            if person.walking or n == 1:
                right, ahead = 0.75 * (k % 2 - 0.5) * (n > 1), 0.15 * (k % 2) - 0.8 * (k // 2)
                heading, offset = self.heading, np.array((right * fz + ahead * fx, ahead * fz - right * fx))
            else:
                angle = 2 * np.pi * k / n + self.speed * 5
                heading = np.array((np.cos(angle), np.sin(angle)))
                offset = -0.55 * heading
            heading = heading + self.rng.normal(0, 0.12, 2)
            person.heading = heading / np.sqrt(heading @ heading)
            person.position = push_out(self.position + offset, things, 0.1)


class Crowd:
    """Groups come and go so that the number in view follows a slow random curve."""

    def __init__(self, rng, things):
        self.rng, self.things, self.groups = rng, things, []
        self.phases, self.drift, self.time = rng.uniform(0, 2 * np.pi, 2), 0.0, 0
        for _ in range(WARMUP):
            self.step()

    def people(self):
        return [person for group in self.groups for person in group.members if person.in_view()]

    def step(self):
        self.groups = [group for group in self.groups if group.step(self.things)]
        self.drift = 0.85 * self.drift + self.rng.normal(0, 1.0)
        fast, slow = np.sin(2 * np.pi * self.time / np.array((41, 87)) + self.phases)
        target = np.clip(CROWD_MEAN + 10.5 * fast + 3 * slow + self.drift, *CROWD_RANGE)
        self.time += 1
        here = len(self.people())
        for _ in range(6):  # groups a frame, at most
            if here < target:
                self.groups.append(self.newcomers())
                here += len(self.groups[-1].members)
        for group in self.groups:  # too many: those who have been here longest stop standing about
            if here > target + 2 and group.stay > 0:
                group.stay, group.route = 0, group.route[-1:]
                here -= 3 * len(group.members)

    def newcomers(self):
        rng = self.rng
        size = 1 + rng.choice(4, p=(0.46, 0.34, 0.13, 0.07))
        family = size > 2 or rng.random() < 0.12
        members = [Person(rng, child=bool(family and k >= max(1, size - 2) and rng.random() < 0.75))
                   for k in range(size)]
        start, end = rng.choice(PORTALS, 2, replace=False) + rng.uniform((-0.5, -0.1), (0.5, 0.1), (2, 2))
        route = []
        for _ in range(rng.choice(3, p=(0.3, 0.45, 0.25))):
            z = FOCAL * EYE / (rng.uniform(150, 440) - HORIZON)  # even over the picture's rows, not the floor
            x = rng.uniform(*np.clip((np.array((0, WIDTH)) - VANISH_X) * z / FOCAL, LEFT + 0.6, RIGHT - 0.6))
            stay = int(rng.geometric(0.06) * (rng.random() < 0.8))
            route.append((*push_out(np.array((x, z)), self.things, 0.5), stay))
        group = Group(rng, members, start, [*route, (*end, 0)])
        group.arrange(1.0, self.things)
        return group


# Pictures.


def paint(image, sprite, corner):
    """Draw a sprite (h, w, 4) on an image in place; return the slices drawn on."""
    (x, y), (h, w) = corner, sprite.shape[:2]
    window = np.s_[y:y + h, x:x + w]
    image[window] = image[window] * (1 - sprite[..., 3:]) + sprite[..., :3]
    return window


def cast_shadow(image, x, z, radius, length, strength):
    """Darken the floor in place: a soft disc at (x, z), and a fainter streak away from the skylight."""
    streak = (0.38 * length, 0.18 * length, 1.2 * radius, 0.45 * strength)
    for dx, dz, r, alpha in ((0, 0, radius, strength), streak):
        cx, cy, scale = project((x + dx, 0, z + dz))
        rx, ry = (r + dx) * scale, max((r + dz) * scale * EYE / z, 1)  # the floor is seen at a slant
        q = ((np.arange(WIDTH) - cx) / rx) ** 2, ((np.arange(HEIGHT) - cy) / ry) ** 2
        cols, rows = (np.flatnonzero(d < 4) for d in q)
        q = q[0][cols] + q[1][rows, None]
        image[np.ix_(rows, cols)] *= (1 - alpha * np.exp(-2 * q))[..., None]


def sunlight(x, z, where):
    """Strength 0..1 at (x, z) of sun through skylight panes whose middle falls on x = where."""
    across = x - where + 0.4 * (z - 13)
    patch = np.clip((2.9 - np.abs(across)) / 0.3, 0, 1) * np.clip((4 - np.abs(z - 13)) / 0.5, 0, 1)
    return patch * np.clip((np.abs((across + 1) % 2 - 1) - 0.07) / 0.06, 0, 1)


def compose(empty, floor_xz, things, people, cloth, sun_x):
    """One moment of the scene: image (HEIGHT, WIDTH, 3) and count."""
    image = empty * (1 + 0.14 * sunlight(*floor_xz, sun_x))[..., None]
    layers = [(z, sprite, corner, False) for _, z, _, sprite, corner in things]
    for person in people:
        (x, z), (sprite, (x0, y0)) = person.position, person.sprite(cloth)
        sprite[..., :3] *= 1 + 0.11 * sunlight(x, z, sun_x)
        layers.append((z, sprite, (x0, y0), True))
        cast_shadow(image, x, z, 0.18 * person.height, 0.9 * person.height, 0.55)
        foot = int(project((x, 0, z))[1])
        mirrored = sprite[::-1][max(0, y0 + len(sprite) - foot):][:max(0, HEIGHT - foot)]
        if len(mirrored):  # a reflection in the polish, fading upwards
            paint(image, mirrored * np.linspace(0.22, 0, len(mirrored))[:, None, None], (x0, foot))
    layers.sort(key=lambda layer: -layer[0])
    owner = np.full((HEIGHT, WIDTH), len(layers))
    for k, (_, sprite, corner, _) in enumerate(layers):
        window = paint(image, sprite, corner)
        owner[window][sprite[..., 3] > 0.5] = k
    seen = np.bincount(owner.ravel(), minlength=len(layers))
    count = sum(seen[k] >= MIN_VISIBLE * max(1, (sprite[..., 3] > 0.5).sum())
                for k, (_, sprite, _, is_person) in enumerate(layers) if is_person)
    return image, int(count)


def pictures(seed=0):
    """Yield (frame uint8 (HEIGHT, WIDTH, 3), count) for ever."""
    rng = np.random.default_rng((seed, 0))
    empty, *floor_xz = backdrop(rng)
    things = clutter(rng)
    for x, z, radius, *_ in things:
        cast_shadow(empty, x, z, 0.9 * radius, 0.9, 0.45)
    cloth = ndimage.gaussian_filter(rng.normal(size=(256, 256)), 0.9, mode="wrap") * 3
    down, across = np.ogrid[-0.5:0.5:HEIGHT * 1j, -0.5:0.5:WIDTH * 1j]
    vignette = 1 - 0.22 * (down ** 2 + across ** 2)[..., None]
    phases = rng.uniform(0, 2 * np.pi, 4)
    crowd = Crowd(np.random.default_rng((seed, 1)), things)
    for t in itertools.count():
        sun, slow, fast, warm = np.sin(2 * np.pi * t / np.array((83, 61, 23, 74)) + phases)
        image, count = compose(empty, floor_xz, things, crowd.people(), cloth, 1 + 6.5 * sun)
        gain = 1.03 + 0.03 * slow + 0.015 * fast + 0.012 * warm * np.array((1, 0.1, -1))
        image = ndimage.gaussian_filter(image, (0.55, 0.55, 0)) * vignette * gain
        noise = np.random.default_rng((seed, 2, t)).normal(0, 0.004, (HEIGHT, WIDTH, 1))
        yield np.uint8(np.clip((image + noise * (0.6 + image)) * 255 + 0.5, 0, 255)), count
        crowd.step()


def render(out, frames=200, seed=0):
    """Write labels.csv and frames/frames/seq_*.jpg under out, replacing a rendering; return the labels."""
    out = Path(out)
    folder, labels = out / "frames" / "frames", out / "labels.csv"
    old = sorted(folder.glob("seq_*.jpg"))
    if (labels.exists() and not old) or any(Image.open(path).info.get("comment") != COMMENT for path in old):
        raise SystemExit(f"{out} holds data that this script did not render: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    labels.unlink(missing_ok=True)  # first: an interrupted rendering must not look complete
    for path in old:
        path.unlink()
    counts = []
    for index, (frame, count) in zip(range(1, frames + 1), pictures(seed)):
        path = folder / f"seq_{index:06d}.jpg"
        Image.fromarray(frame).save(path, quality=JPEG_QUALITY, optimize=True, comment=COMMENT)
        counts.append(count)
    table = pd.DataFrame({"id": range(1, frames + 1), "count": counts})
    table.to_csv(labels, index=False, lineterminator="\n")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2])
    args = parser.parse_args()
    counts = render(args.out, args.frames, args.seed)["count"]
    print(f"{len(counts)} frames in {args.out}, {counts.min()} to {counts.max()} people")


if __name__ == "__main__":
    main()
