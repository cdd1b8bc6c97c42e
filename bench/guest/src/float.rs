//! Floating point as compilers make it for every x86-64 CPU. No function of the C library: which
//! variant of those is used, and so the last bit of the result, depends on the CPU.

use std::hint::black_box;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 5] = [
    (
        "matmul",
        Class::Float,
        "multiplies matrices of doubles",
        matmul,
    ),
    ("nbody", Class::Float, "planets around the sun", nbody),
    ("mandelbrot", Class::Float, "the Mandelbrot set", mandelbrot),
    ("fft", Class::Float, "fast Fourier transforms", fft),
    (
        "spectral",
        Class::Float,
        "spectral norm of a matrix",
        spectral,
    ),
];

/// Checksum of the exact bits.
fn bits(numbers: impl IntoIterator<Item = f64>) -> u64 {
    numbers.into_iter().fold(0, |sum, x| mix(sum, x.to_bits()))
}

fn matmul(size: Size) -> Result<Task, String> {
    const N: usize = 300;
    let mut random = Random::new(8);
    let mut matrix = || -> Vec<f64> {
        (0..N * N)
            .map(|_| random.below(2000) as f64 / 1000.0 - 1.0)
            .collect()
    };
    let (a, b) = (matrix(), matrix());
    let rounds = size.of(6);
    Ok(Box::new(move || {
        let mut c = vec![0.0; N * N];
        for _ in 0..rounds {
            c.fill(0.0);
            for (a_row, c_row) in a.chunks(N).zip(c.chunks_mut(N)) {
                for (&x, b_row) in a_row.iter().zip(black_box(&b).chunks(N)) {
                    for (sum, &y) in c_row.iter_mut().zip(b_row) {
                        *sum += x * y;
                    }
                }
            }
        }
        bits(c)
    }))
}

fn nbody(size: Size) -> Result<Task, String> {
    #[derive(Clone)]
    struct Body {
        at: [f64; 3],
        speed: [f64; 3],
        mass: f64,
    }
    let mut random = Random::new(1609);
    let mut coordinate =
        |range: f64| (random.below(1 << 20) as f64 / f64::from(1 << 20) - 0.5) * range;
    let start: Vec<Body> = (0..5)
        .map(|n| Body {
            at: [coordinate(40.0), coordinate(40.0), coordinate(5.0)],
            speed: [coordinate(2.0), coordinate(2.0), coordinate(0.2)],
            mass: if n == 0 { 39.5 } else { 0.03 },
        })
        .collect();
    let steps = size.of(700_000);
    Ok(Box::new(move || {
        const STEP: f64 = 0.001;
        let mut bodies = start.clone();
        for _ in 0..steps {
            for i in 1..bodies.len() {
                let (left, right) = bodies.split_at_mut(i);
                let b = &mut right[0];
                for a in left {
                    let d = [a.at[0] - b.at[0], a.at[1] - b.at[1], a.at[2] - b.at[2]];
                    let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
                    let factor = STEP / (square * square.sqrt());
                    for (axis, &way) in d.iter().enumerate() {
                        a.speed[axis] -= way * b.mass * factor;
                        b.speed[axis] += way * a.mass * factor;
                    }
                }
            }
            for body in &mut bodies {
                for (at, speed) in body.at.iter_mut().zip(&body.speed) {
                    *at += STEP * speed;
                }
            }
        }
        bits(bodies.into_iter().flat_map(|b| b.at))
    }))
}

fn mandelbrot(size: Size) -> Result<Task, String> {
    const WIDTH: u32 = 400;
    let rows = size.of(400);
    Ok(Box::new(move || {
        let mut sum = 0;
        for row in 0..rows {
            for column in 0..WIDTH {
                let cr = f64::from(column) * 3.0 / f64::from(WIDTH) - 2.25;
                let ci = f64::from(row) * 3.0 / f64::from(rows) - 1.5;
                let (mut r, mut i, mut steps) = (0.0, 0.0, 0u64);
                while steps < 250 && r * r + i * i < 4.0 {
                    (r, i) = (r * r - i * i + cr, 2.0 * r * i + ci);
                    steps += 1;
                }
                sum += steps;
            }
        }
        sum
    }))
}

/// The complex number e^(2πi/n) for a power of two, by halving angles from n = 4 on.
fn root_of_unity(n: usize) -> (f64, f64) {
    let (mut cos, mut sin) = (0.0f64, 1.0f64);
    let mut m = 4;
    while m < n {
        (cos, sin) = (((1.0 + cos) / 2.0).sqrt(), sin / (2.0 * (1.0 + cos)).sqrt());
        m *= 2;
    }
    match n {
        1 => (1.0, 0.0),
        2 => (-1.0, 0.0),
        _ => (cos, sin),
    }
}

fn fft(size: Size) -> Result<Task, String> {
    const N: usize = 1 << 15;
    type Complex = (f64, f64);
    fn times(a: Complex, b: Complex) -> Complex {
        (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
    }
    let mut random = Random::new(4);
    let input: Vec<Complex> = (0..N)
        .map(|_| (random.below(1000) as f64, random.below(1000) as f64))
        .collect();
    let step = root_of_unity(N);
    let roots: Vec<Complex> = std::iter::successors(Some((1.0, 0.0)), |&w| Some(times(w, step)))
        .take(N / 2)
        .collect();
    let rounds = size.of(50);
    Ok(Box::new(move || {
        let mut data = input.clone();
        for _ in 0..rounds {
            for at in 0..N {
                let mirrored = at.reverse_bits() >> (usize::BITS - N.trailing_zeros());
                if at < mirrored {
                    data.swap(at, mirrored);
                }
            }
            let mut half = 1;
            while half < N {
                let stride = N / (2 * half);
                for block in data.chunks_mut(2 * half) {
                    let (low, high) = block.split_at_mut(half);
                    for ((a, b), &w) in low.iter_mut().zip(high).zip(roots.iter().step_by(stride)) {
                        let t = times(*b, w);
                        *b = (a.0 - t.0, a.1 - t.1);
                        *a = (a.0 + t.0, a.1 + t.1);
                    }
                }
                half *= 2;
            }
            // Keeps the numbers in range over many rounds.
            for value in &mut data {
                *value = (value.0 / 181.0, value.1 / 181.0);
            }
        }
        bits(data.into_iter().flat_map(|c| [c.0, c.1]))
    }))
}

fn spectral(size: Size) -> Result<Task, String> {
    const N: usize = 400;
    fn element(i: usize, j: usize) -> f64 {
        1.0 / ((i + j) * (i + j + 1) / 2 + i + 1) as f64
    }
    fn apply(v: &[f64]) -> Vec<f64> {
        let rows: Vec<f64> = (0..N)
            .map(|i| (0..N).map(|j| element(i, j) * v[j]).sum())
            .collect();
        (0..N)
            .map(|i| (0..N).map(|j| element(j, i) * rows[j]).sum())
            .collect()
    }
    let rounds = size.of(80);
    Ok(Box::new(move || {
        let mut v = vec![1.0; N];
        for _ in 0..rounds {
            v = apply(&v);
            let largest = v.iter().copied().fold(0.0, f64::max);
            v.iter_mut().for_each(|x| *x /= largest);
        }
        bits(v)
    }))
}
