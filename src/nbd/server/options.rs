//! What the server answers to each option (spec: "Option types").

use super::{BASE_ALLOCATION_ID, Contexts, FERRY_HOT_ID, ServerHandshake, ServerStep};
use crate::nbd::consts::{BASE_ALLOCATION, EXPORT_NAME_ZEROES, FERRY_HOT, FERRY_VERSION};
use crate::nbd::export_info::ExportInfo;
use crate::nbd::option::{OptionKind, OptionReplyKind, put_option_reply};
use crate::nbd::option_data::{
    FerryAnswer, FerryRequest, Info, InfoKind, InfoRequest, MetaContext, MetaContextRequest, ServerEntry,
};
use crate::nbd::wire::string;

/// Whether the data of this option is worth reading; all others are skipped and answered `NBD_REP_ERR_UNSUP`.
pub(super) fn is_known(option: OptionKind) -> bool {
    use OptionKind::*;
    match option {
        ExportName | Abort | List | Info | Go | StructuredReply | ListMetaContext | SetMetaContext | Ferry => true,
        StartTls | ExtendedHeaders | Unknown(_) => false,
    }
}

/// An error reply: its kind, and words for a human.
type Refusal = (OptionReplyKind, String);

/// The replies to one option, the last of which ends it.
struct Replies {
    option: OptionKind,
    out: Vec<u8>,
}

impl Replies {
    fn to(option: OptionKind) -> Self {
        Self { option, out: Vec::new() }
    }

    fn add(&mut self, kind: OptionReplyKind, data: &[u8]) {
        put_option_reply(&mut self.out, self.option, kind, data);
    }

    fn ack(mut self) -> Vec<u8> {
        self.add(OptionReplyKind::Ack, &[]);
        self.out
    }

    fn refuse(mut self, (kind, text): Refusal) -> Vec<u8> {
        self.add(kind, text.as_bytes());
        self.out
    }
}

fn invalid(why: impl std::fmt::Display) -> Refusal {
    (OptionReplyKind::ErrInvalid, format!("invalid option data: {why}"))
}

impl ServerHandshake {
    pub(super) fn on_data(&mut self, option: OptionKind, data: &[u8]) -> ServerStep {
        let reply = match option {
            OptionKind::ExportName => return self.on_export_name(data),
            OptionKind::Abort => {
                return ServerStep::Close { reply: Replies::to(option).ack() };
            }
            OptionKind::Info => self.on_info(option, data).map(|(_, reply)| reply),
            OptionKind::Go => match self.on_info(option, data) {
                Ok((export_index, reply)) => return self.enter(export_index, reply),
                Err(refusal) => Err(refusal),
            },
            OptionKind::List => self.on_list(data),
            OptionKind::StructuredReply => self.on_structured_reply(data),
            OptionKind::ListMetaContext => self.on_list_meta_context(data),
            OptionKind::SetMetaContext => self.on_set_meta_context(data),
            OptionKind::Ferry => self.on_ferry(data),
            OptionKind::StartTls | OptionKind::ExtendedHeaders | OptionKind::Unknown(_) => {
                Err((OptionReplyKind::ErrUnsupported, format!("{option} is not supported")))
            }
        };
        let reply = reply.unwrap_or_else(|refusal| Replies::to(option).refuse(refusal));
        self.next_option(reply)
    }

    fn enter(&self, export_index: usize, reply: Vec<u8>) -> ServerStep {
        let flags = self.exports[export_index].wire_flags(self.agreed.structured);
        ServerStep::Transmission { reply, session: self.session(export_index, flags) }
    }

    /// The export of this name; the empty name means the first one, unless one is really called so.
    fn find(&self, name: &str) -> Result<(usize, &ExportInfo), Refusal> {
        let index = self.exports.iter().position(|export| export.name == name);
        let index = index.or_else(|| name.is_empty().then_some(0)).filter(|index| *index < self.exports.len());
        match index {
            Some(index) => Ok((index, &self.exports[index])),
            None => Err((OptionReplyKind::ErrUnknown, format!("there is no export named {name:?} here"))),
        }
    }

    fn on_export_name(&mut self, data: &[u8]) -> ServerStep {
        let name = string(data).ok();
        let Some((index, export)) = name.and_then(|name| self.find(&name).ok()) else {
            return ServerStep::Close { reply: Vec::new() };
        };
        let mut reply = Vec::new();
        reply.extend_from_slice(&export.size_bytes.to_be_bytes());
        reply.extend_from_slice(&export.wire_flags(self.agreed.structured).bits().to_be_bytes());
        if !self.no_zeroes {
            reply.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
        self.enter(index, reply)
    }

    fn on_list(&self, data: &[u8]) -> Result<Vec<u8>, Refusal> {
        if !data.is_empty() {
            return Err(invalid("NBD_OPT_LIST takes none"));
        }
        let mut replies = Replies::to(OptionKind::List);
        for export in &self.exports {
            let description = export.description.clone().unwrap_or_default();
            let entry = ServerEntry { name: export.name.clone(), description };
            replies.add(OptionReplyKind::Server, &entry.encode());
        }
        Ok(replies.ack())
    }

    /// INFO and GO: the index of the export, and the replies up to the ACK.
    fn on_info(&self, option: OptionKind, data: &[u8]) -> Result<(usize, Vec<u8>), Refusal> {
        let request = InfoRequest::decode(data).map_err(invalid)?;
        let (index, export) = self.find(&request.export)?;
        let mut replies = Replies::to(option);
        let flags = export.wire_flags(self.agreed.structured);
        replies.add(OptionReplyKind::Info, &Info::Export { size_bytes: export.size_bytes, flags }.encode());
        let asked = |kind| request.infos.contains(&kind);
        if asked(InfoKind::BlockSize) {
            replies.add(OptionReplyKind::Info, &Info::BlockSize(export.block_sizes()).encode());
        }
        if asked(InfoKind::Name) {
            replies.add(OptionReplyKind::Info, &Info::Name(export.name.clone()).encode());
        }
        if let Some(text) = export.description.as_ref().filter(|_| asked(InfoKind::Description)) {
            replies.add(OptionReplyKind::Info, &Info::Description(text.clone()).encode());
        }
        Ok((index, replies.ack()))
    }

    fn on_structured_reply(&mut self, data: &[u8]) -> Result<Vec<u8>, Refusal> {
        if !data.is_empty() {
            return Err(invalid("NBD_OPT_STRUCTURED_REPLY takes none"));
        }
        self.agreed.structured = true;
        Ok(Replies::to(OptionKind::StructuredReply).ack())
    }

    fn meta_context_request(&self, data: &[u8]) -> Result<(usize, MetaContextRequest), Refusal> {
        if !self.agreed.structured {
            let text = "metadata contexts need NBD_OPT_STRUCTURED_REPLY first";
            return Err((OptionReplyKind::ErrInvalid, text.to_owned()));
        }
        let request = MetaContextRequest::decode(data).map_err(invalid)?;
        let (index, _) = self.find(&request.export)?;
        Ok((index, request))
    }

    fn on_list_meta_context(&self, data: &[u8]) -> Result<Vec<u8>, Refusal> {
        let (index, request) = self.meta_context_request(data)?;
        let mut replies = Replies::to(OptionKind::ListMetaContext);
        let offered = [(BASE_ALLOCATION, true), (FERRY_HOT, self.exports[index].tells_hot)];
        for (name, _) in offered.iter().filter(|(_, offered)| *offered) {
            // No query asks for everything; `base:` is the wildcard of the base namespace, and so on.
            let namespace = &name[..=name.find(':').expect("all have one")];
            let wanted = |query: &String| query == name || query == namespace;
            if request.queries.is_empty() || request.queries.iter().any(wanted) {
                let context = MetaContext { id: 0, name: (*name).to_owned() };
                replies.add(OptionReplyKind::MetaContext, &context.encode());
            }
        }
        Ok(replies.ack())
    }

    fn on_set_meta_context(&mut self, data: &[u8]) -> Result<Vec<u8>, Refusal> {
        // Whatever comes of it, the former selection is gone.
        self.agreed.contexts_of = None;
        let (index, request) = self.meta_context_request(data)?;
        let mut replies = Replies::to(OptionKind::SetMetaContext);
        let asked = |name| request.queries.iter().any(|query| query == name);
        let hot = self.exports[index].tells_hot && asked(FERRY_HOT);
        let contexts = Contexts { base_allocation: asked(BASE_ALLOCATION), hot };
        self.agreed.contexts_of = Some((index, contexts));
        let chosen = [(BASE_ALLOCATION_ID, BASE_ALLOCATION, contexts.base_allocation), (FERRY_HOT_ID, FERRY_HOT, hot)];
        for (id, name, _) in chosen.into_iter().filter(|(_, _, chosen)| *chosen) {
            replies.add(OptionReplyKind::MetaContext, &MetaContext { id, name: name.to_owned() }.encode());
        }
        Ok(replies.ack())
    }

    fn on_ferry(&mut self, data: &[u8]) -> Result<Vec<u8>, Refusal> {
        self.agreed.ferry_of = None;
        let request = FerryRequest::decode(data).map_err(invalid)?;
        let unsupported = |why: &str| (OptionReplyKind::ErrUnsupported, why.to_owned());
        if request.version != FERRY_VERSION {
            return Err(unsupported("another version of the ferry option"));
        }
        let (index, export) = self.find(&request.export)?;
        let identity = export.identity.clone().ok_or_else(|| unsupported("this export has no identity"))?;
        let answer = FerryAnswer { version: FERRY_VERSION, identity, handoff: export.standing.clone() };
        self.agreed.ferry_of = Some(index);
        let mut replies = Replies::to(OptionKind::Ferry);
        replies.add(OptionReplyKind::Ferry, &answer.encode());
        Ok(replies.ack())
    }
}
