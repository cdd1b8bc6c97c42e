//! Machine code to start from: each line is a few instructions that mean something in some mode.

/// Hexadecimal code.
const PROGRAMS: &[&str] = &[
    // Arithmetic, addressing, loops.
    "4801d8 4829c3 480fafc3 48c1e003 4c8d4c8b10 e2f0 f4",
    "488b0424 48890424 48018424 00100000 488b8c8b00010000 c3",
    "b90a000000 49ffc0 75fb eb02 0f0b e8f0ffffff",
    "f30f1efa 55 4889e5 4883ec20 c9 c3",
    "0fb6c3 0fbec7 480fb7d0 0fb703 88e0 86c4 00e4 668901",
    "f348ab f3a4 f2ae f3a6 fc fd ad 6c 6e f36c f36e",
    "f0480fb10b f0480fc10b f0ff03 870b 0fc7c8 f0480fc70b",
    "480fbcc3 480fbdc3 f3480fb8c3 f3480fbcc3 480fa303 480fab03 0fa2 0f01d0",
    // Vectors.
    "0f280b 660f6f03 660fefc0 f30f6f4310 0f2903 f20f58c1 660f3a0fc108",
    "c5f877 c5fc2803 c4e27d1803 c4e2fd90048b c4e2f9f7c3 c4e278f2c3 c5f92ec1",
    "62f17c482803 62f17c4a2903 62f27d48900c8b 62f1fd486f03 c5f892c0 62f27d287c03",
    "660f3880c3 660f38dcc1 0f38c8c1 66480f6ec0 66480f7ec0 f30fe6c1 0fae03 0fae0b 0faeE8",
    // x87.
    "9bdbe3 d9e8 d9ee dec1 dd1b db2b dd33 dd23 d9fe",
    // System.
    "0f20c0 0f22c0 0f20d8 0f22d8 0f20e0 0f22e0 0f01f8 0f05 0f07 0f34 0f35",
    "0f32 0f30 0f31 0f01f9 e4 60 e670 ec ed ee ef fa fb f4",
    "0f0103 0f010b 0f0113 0f011b 0f0123 0f0133 0f00c0 0f00c8 0f00d0 0f00d8 0f00e0 0f00e8",
    "cd80 cc ce cf 48cf cb ca0800 9c 9d 66cf f1",
    "0f23c0 0f23f8 0f21f8 0f01d1 0f01d9 0f01c1 0f01ca 0f01cb 660f388203 0f013b",
    "0fae23 0fae2b 0fc723 0fc72b 480fae23 480fc71b f3480faec0 f3480faed3",
    // 16 and 32 bits.
    "b80010 8ed8 8ec0 8ed0 1e 07 06 1f ea00100000 9a00100000 c41e0010 c53e0010",
    "40 4b 60 61 27 2f 37 3f d40a d50a 62 1e 0010 63d8 c8 1000 01 c9",
    "ea001000002800 9a001000002800 ff2b ff1b ea000000004000 ea000000006000 cf",
    "66b801000000 67668b0403 2e8b07 658b07 f3a5 6766a5 e80000",
    // Self-modifying, page-crossing.
    "c60390 c605000000009090 8803 eb fe",
];

/// The bytes of each program.
pub fn programs() -> impl Iterator<Item = Vec<u8>> {
    PROGRAMS.iter().map(|text| {
        let digits: Vec<u8> = text
            .chars()
            .filter_map(|c| c.to_digit(16).map(|d| d as u8))
            .collect();
        digits
            .chunks_exact(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    })
}

/// Inputs for [`crate::machine::machine`]: each program in each mode.
pub fn guests() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for program in programs() {
        for mode in [0, 1, 2, 3, 5, 7] {
            for options in [0, 4] {
                let mut seed = vec![mode, 0, options];
                seed.extend_from_slice(&program);
                all.push(seed);
            }
        }
    }
    all
}
