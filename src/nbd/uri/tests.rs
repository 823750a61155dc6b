use super::*;
use proptest::prelude::*;

fn tcp(host: &str, port: u16, export: &str) -> Uri {
    Address::Tcp { host: host.into(), port }.uri(export)
}

fn unix(path: &str, export: &str) -> Uri {
    Address::Unix(path.into()).uri(export)
}

#[track_caller]
fn parse(text: &str) -> Uri {
    text.parse().unwrap()
}

#[track_caller]
fn error(text: &str) -> UriError {
    text.parse::<Uri>().unwrap_err()
}

#[test]
fn the_examples_of_the_spec() {
    assert_eq!(parse("nbd://example.com:10809/export"), tcp("example.com", 10809, "export"));
    assert_eq!(parse("nbd+unix:///export?socket=nbd.sock"), unix("nbd.sock", "export"));
    assert_eq!(parse("nbd://example.com/disk"), tcp("example.com", 10809, "disk"));
    assert_eq!(parse("nbd+unix:///disk?socket=sock"), unix("sock", "disk"));
    assert_eq!(parse("nbd://example.com/"), tcp("example.com", 10809, ""));
    assert_eq!(parse("nbd://example.com"), tcp("example.com", 10809, ""));
    assert_eq!(parse("nbd://example.com//disk"), tcp("example.com", 10809, "/disk"));
    assert_eq!(parse("nbd://example.com/hello%20world"), tcp("example.com", 10809, "hello world"));
}

#[test]
fn hosts_and_ports() {
    assert_eq!(parse("NBD://h:1"), tcp("h", 1, ""));
    assert_eq!(parse("nbd://"), tcp("localhost", 10809, ""));
    assert_eq!(parse("nbd:///x"), tcp("localhost", 10809, "x"));
    assert_eq!(parse("nbd://h:/x"), tcp("h", 10809, "x"));
    assert_eq!(parse("nbd://10.0.0.1:65535"), tcp("10.0.0.1", 65535, ""));
    assert_eq!(parse("nbd://[::1]"), tcp("::1", 10809, ""));
    assert_eq!(parse("nbd://[2001:db8::2]:99/a/b"), tcp("2001:db8::2", 99, "a/b"));
    assert_eq!(parse("nbd://[fe80::1%25eth0]:99/"), tcp("fe80::1%eth0", 99, ""));
    for port in ["0", "65536", "+1", "x", "-1", "1 "] {
        assert_eq!(error(&format!("nbd://h:{port}/x")), UriError::Port(port.into()));
    }
    for host in ["::1", "[::1", "[::g]", "[h]", "[]", "a b", "[::1]x", "[fe80::1%]", "a]"] {
        assert!(matches!(error(&format!("nbd://{}/x", host.replace('%', "%25"))), UriError::Host(_)), "{host}");
    }
}

#[test]
fn sockets() {
    assert_eq!(parse("nbd+unix://?socket=/run/a"), unix("/run/a", ""));
    assert_eq!(parse("nbd+unix:///a%3Fb?socket=/run/a%20b%26c&"), unix("/run/a b&c", "a?b"));
    assert_eq!(error("nbd+unix:///x"), UriError::NoSocket);
    assert_eq!(error("nbd+unix:///x?socket"), UriError::SocketPath(PathBuf::new()));
    assert!(matches!(error("nbd+unix:///?socket=%00/abstract"), UriError::SocketPath(_)));
    let long = "s".repeat(MAX_SOCKET_PATH);
    assert_eq!(parse(&format!("nbd+unix:///?socket={long}")), unix(&long, ""));
    assert!(matches!(error(&format!("nbd+unix:///?socket={long}s")), UriError::SocketPath(_)));
    assert_eq!(error("nbd+unix:///?socket=a&socket=b"), UriError::Twice("socket".into()));
    assert_eq!(error("nbd+unix://h/x?socket=a"), UriError::HostWithUnix("h".into()));
    assert_eq!(error("nbd://h/x?socket=a"), UriError::Parameter("socket".into()));
}

#[test]
fn what_is_no_uri_says_what_to_write() {
    assert_eq!(error("nbds://h/x"), UriError::Tls("nbds://".into()));
    assert_eq!(error("nbds+unix:///x?socket=a"), UriError::Tls("nbds+unix://".into()));
    assert_eq!(error("nbd://h/x?tls-type=psk"), UriError::Tls("parameter tls-type".into()));
    assert_eq!(error("nbd://me@h/x"), UriError::UserInfo("me".into()));
    assert_eq!(error("nbd+ssh://h/x"), UriError::Scheme("nbd+ssh".into()));
    assert_eq!(error("http://h/x"), UriError::Scheme("http".into()));
    assert_eq!(error("nbd:h:10809"), UriError::QemuForm("nbd:h:10809".into()));
    assert_eq!(error("/dev/sda"), UriError::NoScheme("/dev/sda".into()));
    assert_eq!(error("nbd://h/x?foo=1"), UriError::Parameter("foo".into()));
    assert_eq!(error("nbd://h/x#y"), UriError::Fragment("nbd://h/x#y".into()));
    for bad in ["%", "%1", "%zz", "a%%41", "%é"] {
        assert_eq!(error(&format!("nbd://h/{bad}")), UriError::Percent(bad.into()));
    }
    assert_eq!(error("nbd://h/%00"), UriError::Export);
    assert_eq!(error("nbd://h/%ff"), UriError::Export);
    assert_eq!(error(&format!("nbd://h/{}", "x".repeat(4097))), UriError::Export);
    assert!(error("nbds://h/x").to_string().starts_with("TLS is not supported yet"));
}

#[test]
fn listen_addresses() {
    let parse = |text: &str| text.parse::<Address>();
    let tcp = |host: &str, port| Ok(Address::Tcp { host: host.into(), port });
    assert_eq!(parse("h:10809"), tcp("h", 10809));
    assert_eq!(parse(":10809"), tcp("", 10809));
    assert_eq!(parse("[::]:0"), tcp("::", 0));
    assert_eq!(parse("unix:/run/x y"), Ok(Address::Unix("/run/x y".into())));
    assert_eq!(parse("h"), Err(UriError::Listen("h".into())));
    assert_eq!(parse("[::1]"), Err(UriError::Listen("[::1]".into())));
    assert_eq!(parse(""), Err(UriError::Listen(String::new())));
    assert_eq!(parse("h:"), Err(UriError::Port(String::new())));
    assert_eq!(parse("::1"), Err(UriError::Host("::1".into())));
    assert_eq!(parse("unix:"), Err(UriError::SocketPath(PathBuf::new())));
}

fn addresses() -> impl Strategy<Value = Address> {
    let hosts = prop_oneof![
        "[a-z0-9][a-z0-9.-]{0,20}",
        any::<std::net::Ipv4Addr>().prop_map(|ip| ip.to_string()),
        any::<Ipv6Addr>().prop_map(|ip| ip.to_string()),
        any::<Ipv6Addr>().prop_map(|ip| format!("{ip}%eth0")),
    ];
    prop_oneof![
        (hosts, 1..=u16::MAX).prop_map(|(host, port)| Address::Tcp { host, port }),
        "[^\0]{1,26}".prop_map(|path| Address::Unix(path.into())),
    ]
}

proptest! {
    #[test]
    fn uris_survive_being_written(address in addresses(), export in "[^\0]{0,40}") {
        let uri = address.uri(export);
        let text = uri.to_string();
        prop_assert!(text.is_ascii() && !text.contains(char::is_whitespace), "{}", text);
        prop_assert_eq!(text.parse::<Uri>(), Ok(uri));
    }

    #[test]
    fn socket_paths_of_any_bytes_survive(path in prop::collection::vec(1..=u8::MAX, 1..=MAX_SOCKET_PATH)) {
        let uri = Address::Unix(OsString::from_vec(path).into()).uri("x");
        prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
    }

    #[test]
    fn addresses_survive_being_written(address in addresses()) {
        prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
    }

    #[test]
    fn no_text_makes_the_parsers_panic(
        text in "(nbd(s|[+]unix)?://?/?)?[\\[\\]:@%?=&#/a0é]{0,20}((socket=|unix:).{0,9})?",
        wild in any::<String>(),
    ) {
        for text in [text, wild] {
            if let Ok(uri) = text.parse::<Uri>() {
                // Whatever is accepted can be written, and means the same again.
                prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
            }
            let _ = text.parse::<Address>();
        }
    }
}
