//! What the client makes of each option reply (spec: "Option reply types").

use super::{ClientHandshake, ClientStep, ORDER, State, option_bytes};
use crate::nbd::consts::{BASE_ALLOCATION, FERRY_HOT, MAX_OPTION_REPLY_LEN};
use crate::nbd::error::ProtocolError;
use crate::nbd::handoff::HANDOFF_VERSION;
use crate::nbd::option::{OptionKind, OptionReplyHeader, OptionReplyKind};
use crate::nbd::option_data::{FerryAnswer, Info, MetaContext, ServerEntry};
use crate::nbd::wire::{Defect, printable};

impl ClientHandshake {
    pub(super) fn on_reply_header(&mut self, message: &[u8]) -> Result<ClientStep, ProtocolError> {
        let message = message.try_into().expect("the header was collected in its full length");
        let header = OptionReplyHeader::decode(message, self.asked)?;
        let (option, len_bytes, max_bytes) = (self.asked, header.len_bytes, MAX_OPTION_REPLY_LEN);
        if len_bytes as usize > max_bytes {
            return Err(ProtocolError::OptionReplyTooLong { option, len_bytes, max_bytes });
        }
        if len_bytes == 0 {
            return self.on_reply(header.kind, &[]);
        }
        self.read_on(State::ReplyData(header), len_bytes as usize)
    }

    pub(super) fn on_reply(&mut self, kind: OptionReplyKind, data: &[u8]) -> Result<ClientStep, ProtocolError> {
        if kind.is_error() {
            return self.on_refusal(kind, printable(data));
        }
        if kind == OptionReplyKind::Ack {
            return self.on_ack(data);
        }
        let option = self.asked;
        self.on_information(kind, data)
            .map_err(|defect| ProtocolError::MalformedOptionReply { option, defect })?
            .ok_or(ProtocolError::UnexpectedReply { option, kind })?;
        self.read_on(State::ReplyHeader, OptionReplyHeader::LEN)
    }

    /// A reply that is not the last one; `None` if it does not belong to the option.
    fn on_information(&mut self, kind: OptionReplyKind, data: &[u8]) -> Result<Option<()>, Defect> {
        match (self.asked, kind) {
            (OptionKind::Go, OptionReplyKind::Info) => self.found.add_info(Info::decode(data)?),
            (OptionKind::SetMetaContext, OptionReplyKind::MetaContext) => {
                let context = MetaContext::decode(data)?;
                match context.name.as_str() {
                    BASE_ALLOCATION => self.found.base_allocation = Some(context.id),
                    FERRY_HOT => self.found.hot = Some(context.id),
                    _ => {}
                }
            }
            (OptionKind::Ferry, OptionReplyKind::Ferry) => {
                let FerryAnswer { identity, handoff, .. } = FerryAnswer::decode(data)?;
                self.found.ferry_identity = Some(identity);
                // Of another version nothing is known: as if it could not change hands.
                self.found.standing = handoff.filter(|standing| standing.version == HANDOFF_VERSION);
            }
            (OptionKind::List, OptionReplyKind::Server) => {
                let ServerEntry { name, description } = ServerEntry::decode(data)?;
                self.listed.push((name, description));
            }
            _ => return Ok(None),
        }
        Ok(Some(()))
    }

    fn on_ack(&mut self, data: &[u8]) -> Result<ClientStep, ProtocolError> {
        if !data.is_empty() {
            return Err(ProtocolError::MalformedOptionReply { option: self.asked, defect: Defect::TrailingBytes });
        }
        match self.asked {
            OptionKind::Go => self.ready(),
            OptionKind::List => Ok(ClientStep::Listed {
                exports: std::mem::take(&mut self.listed),
                send: option_bytes(OptionKind::Abort, &[]),
            }),
            done => {
                self.found.structured |= done == OptionKind::StructuredReply;
                Ok(self.go_on(done))
            }
        }
    }

    fn go_on(&mut self, done: OptionKind) -> ClientStep {
        if let Some(next) = self.later.pop_front() {
            self.expect_reply(next);
            return ClientStep::Send(Vec::new());
        }
        if done == OptionKind::Ferry && self.is_ferry() {
            return ClientStep::Send(self.ask_together(&ORDER[1..]));
        }
        let next = self.next_option(Some(done));
        ClientStep::Send(self.ask(next))
    }

    fn on_refusal(&mut self, kind: OptionReplyKind, message: String) -> Result<ClientStep, ProtocolError> {
        let option = self.asked;
        match (option, kind) {
            // After these two nothing else would succeed, either.
            (_, OptionReplyKind::ErrTlsRequired) => {
                Err(ProtocolError::TlsRequired { export: self.export.clone(), message })
            }
            (_, OptionReplyKind::ErrShutdown) => Err(ProtocolError::ServerShutdown { message }),
            (OptionKind::StructuredReply | OptionKind::SetMetaContext | OptionKind::Ferry, _) => {
                self.found.forget(option);
                Ok(self.go_on(option))
            }
            (OptionKind::Go, OptionReplyKind::ErrUnsupported) => {
                self.found.forget(option);
                Ok(ClientStep::Send(self.ask(OptionKind::ExportName)))
            }
            (_, OptionReplyKind::ErrUnknown) if self.export.is_empty() => {
                Err(ProtocolError::NoDefaultExport { message })
            }
            (_, OptionReplyKind::ErrUnknown) => {
                Err(ProtocolError::ExportUnknown { export: self.export.clone(), message })
            }
            (_, OptionReplyKind::ErrPolicy) => Err(ProtocolError::RefusedByPolicy { option, message }),
            (_, OptionReplyKind::ErrBlockSizeRequired) => Err(ProtocolError::BlockSizesRequired { message }),
            _ => Err(ProtocolError::OptionRefused { option, kind, message }),
        }
    }
}
