//! URIs, listen addresses and the other small texts that people and peers hand over.
//!
//! Whatever is read can be written, and what was written reads as the same.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use blkferry::nbd::{Address, Uri};
use blkferry::remote::OnLoss;

fn there_and_back<T: FromStr + Display + PartialEq + Debug>(text: &str)
where
    T::Err: Display,
{
    match text.parse::<T>() {
        Ok(value) => {
            let written = value.to_string();
            assert_eq!(written.parse().ok(), Some(value), "{text:?} was written as {written:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

pub fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    there_and_back::<Uri>(text);
    there_and_back::<Address>(text);
    there_and_back::<OnLoss>(text);
}

pub fn seeds() -> Vec<Vec<u8>> {
    [
        "nbd://host/disk",
        "nbd://host:10810/a%20b",
        "nbd://[::1]:1/",
        "nbd://[fe80::1%25eth0]/x",
        "nbd://",
        "nbd+unix:///export?socket=/run/x.sock",
        "nbd+unix:///?socket=%2Frun%2Fx&socket=y",
        "nbds://host/?tls-certificates=x",
        "nbd:host:1:exportname=x",
        "nbd://user@host/#x",
        "127.0.0.1:10809",
        "[::]:0",
        ":10809",
        "unix:/run/x.sock",
        "wait",
        "fail-after:1m30s",
        "fail-after:0.5s",
    ]
    .into_iter()
    .map(|text| text.as_bytes().to_vec())
    .collect()
}
